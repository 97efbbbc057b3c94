"""The store itself: entries on disk, how they are addressed, written, read, and kept from the collector."""

import signal
import sys

if sys.argv[:1] == ["-m"]:  # `python -m cache` is looking for its main module, which sets this right
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load is not worth a traceback
