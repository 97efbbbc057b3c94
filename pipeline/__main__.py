"""`python -m pipeline`: see `pipeline.commands`."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load is not worth a traceback
    from pipeline.commands import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
