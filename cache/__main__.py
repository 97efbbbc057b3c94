"""`python -m cache`: runs a tool of the store, and says in one line what went wrong."""

import atexit
import errno
import gc
import os
import signal
import sys

from cache.core.errors import StoreError
from cache.core.text import print_anything
from cache.terminal.output import bad, say
from cache.tools.arguments import build_parser
from cache.tools.commands import STANDARD_OUTPUT

INTERRUPTED_EXIT = 130  # what a shell reports for a process ended by Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    print_anything()
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options)
    except StoreError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT
    except OSError as error:
        if error.errno is None:
            raise
        name = error.filename or "the disk"
        if name == STANDARD_OUTPUT:  # what was printed has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _fail(f"{name}: {error.strerror}; {'make room' if full else 'check it and its permissions'}")


def _fail(message: str) -> int:
    say(bad(f"error: {message}"), to_stderr=True)
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit.register(gc.freeze)  # Python's last look for garbage takes as long as a short command
    sys.exit(main())
