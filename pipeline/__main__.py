"""`python -m pipeline`: see `pipeline.commands`."""

import signal
import sys

from pipeline.process import ending

if __name__ == "__main__":
    ending.prepare()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load is not worth a traceback
    from pipeline.commands import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if ending.is_safe():
        ending.at_once(code)
    sys.exit(code)
