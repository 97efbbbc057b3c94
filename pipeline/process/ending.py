"""The end of a process that has used MindSpore on a CPU.

When a process ends, Python takes every module apart, and MindSpore its thousands of primitives: that takes a
quarter of the time of importing it, for memory that the kernel takes back anyway.  It is left out, and nothing else:
when `_end` is called, threads have ended, and all that other modules registered with atexit has been called,
MindSpore's part too.
"""

import atexit
import os
import sys

_codes: list[int] = []


def prepare() -> None:
    """Call it before anything else registers with atexit, which calls the first registered last."""
    atexit.register(_end)


def at_once(code: int) -> None:
    """Let this process end with ``code`` as soon as all that is registered has been called."""
    _codes.append(code)


def is_safe() -> bool:
    """Whether nothing but memory is left: no NPU, and no other rank that waits for this one."""
    mindspore = sys.modules.get("mindspore")
    return mindspore is not None and "MS_ROLE" not in os.environ and mindspore.get_context("device_target") == "CPU"


def _end() -> None:
    if not _codes:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # Python's own end says it
    os._exit(_codes[-1])
