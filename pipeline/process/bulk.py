"""Making millions of objects at a time."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def made_in_bulk() -> Iterator[None]:
    """A block that makes a great many objects, all of which are kept.

    Python would look through all of them for garbage whenever they have become a quarter more, which takes as long
    as to make them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
