"""Running a stage as a child process, whose life is tied to the scheduler's."""

import multiprocessing
import sys

from pipeline.data.survey_file import SurveyFile
from pipeline.process import children
from pipeline.process.stopping import end_with_parent


class StageFailed(Exception):
    """A stage's process ended with an error, which it has said itself, or without its output."""


def run_stage(stage: str, experiment: str, survey: SurveyFile | None = None) -> None:
    """Run the stage and wait.  Raises StageFailed where it does not end well.

    survey: where the stage finds the photos; without it, it looks at them itself.
    The stage ends with this process, however that ends: see `children.run`.
    """
    if (luigi := multiprocessing.parent_process()) is not None:  # one of several workers: end with Luigi too
        end_with_parent(luigi.pid)
    arguments = ["--experiment", experiment] if experiment else []
    arguments += ["--survey", survey.path] if survey else []
    try:
        code = children.run(["run", stage, *arguments], files=[survey.fileno()] if survey else [])
    except BaseException:
        sys.excepthook = _without_traceback_of_interruption
        raise
    if code:
        raise StageFailed(f"{stage} failed ({children.reason(code)}); the same luigi command tries it again")


def _without_traceback_of_interruption(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(
            "interrupted, and the running stage with it; what was done is kept, the same command goes on from there",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)
