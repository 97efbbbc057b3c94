"""What each stage computes: plain functions, no Luigi.  `stages` has the table of them, `commands` the command line.

docs/architecture.md says what lies in which room, and which room may import which.  As a library the package offers the
names of `pipeline.api`, each imported when it is first asked for: ``import pipeline`` by itself imports nothing else.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.api import (
        Experiment,
        Run,
        StoreError,
        Tensors,
        UserError,
        change,
        load,
        open_run,
        run,
        tensors,
    )

__all__ = ["Experiment", "Run", "StoreError", "Tensors", "UserError", "change", "load", "open_run", "run", "tensors"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
