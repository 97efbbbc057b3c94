"""The end of a ``luigi`` command: what was made, where, and what to do next; or what failed, and what waits for it.

It stands in for Luigi's summary, whose lines have every parameter of every task.
"""

import atexit
import gc
import shlex
from collections.abc import Callable, Iterable

import luigi.interface
from luigi.cmdline_parser import CmdlineParser

from cache import StoreError
from cache.terminal.arguments import fail
from cache.terminal.places import shown
from pipeline import afterwards
from pipeline.errors import UserError
from pipeline.plan.survey import Survey
from pipeline.process.progress import say

NOT_DONE = (
    ("failed", "failed"),
    ("scheduling_error", "could not be looked at"),
    ("run_by_other_worker", "run by another worker"),
    ("upstream_failure", "not run, as what they need failed"),
    ("upstream_scheduling_error", "not run, as what they need could not be looked at"),
    ("upstream_run_by_other_worker", "wait for it"),
    ("not_run", "not given out by the scheduler"),
)
"""Luigi's words for why a task is not done, and ours; in this order."""

_tellers = ["this process"]
"""Who says the end: nobody, in a worker of several."""

OURS = "tasks.table", "tasks.sweep"

SUMMARY = "\n===== Luigi Execution Summary"

LookedAt = Callable[[str], Survey]
"""Gives the survey of an experiment file as it now is, by its path."""


def tell(looked_at: LookedAt) -> None:
    """Have the ``luigi`` command end so.

    `luigi.build`, and a command whose task is somebody else's, are left as Luigi has them.
    """
    schedule_and_run = luigi.interface._schedule_and_run

    def told(tasks, *args, **kwargs):
        try:
            result = schedule_and_run(tasks, *args, **kwargs)
        except UserError as error:  # of an experiment file that was broken meanwhile
            if not is_ours():
                raise
            fail(f"{error}; what was done is kept")
        if is_ours():
            atexit.register(gc.freeze)  # Python's last look for garbage takes as long as a short command
        if is_ours() and _tellers:
            (task,) = tasks
            say_end = getattr(task, "say_end", None)  # of a sweep, which knows more than what this worker saw
            say_end() if say_end else _say(task, luigi.execution_summary._summary_dict(result.worker), looked_at)
        return result

    luigi.interface._schedule_and_run = told  # Luigi offers no other way


def leave_to_others() -> None:
    """Say nothing at the end: whoever started this worker does."""
    _tellers.clear()


def is_ours() -> bool:
    """Whether this is the ``luigi`` command with a task of this package."""
    command = CmdlineParser.get_instance()
    return command is not None and command.get_task_obj().__module__ in OURS


def _say(task: luigi.Task, by_state: dict[str, set[luigi.Task]], looked_at: LookedAt) -> None:
    if task in by_state["completed"] | by_state["already_done"]:
        say_done(task, looked_at, "luigi --module tasks")
        return
    parts = [f"{_names(by_state[state])} {words}" for state, words in NOT_DONE if by_state[state]]
    kept = f"; done and kept: {_names(by_state['completed'])}" if by_state["completed"] else ""
    say(f"{task} is not done: {'; '.join(parts)}{kept}", to_stderr=True)


def say_done(task: luigi.Task, looked_at: LookedAt, front: str, options: str = "") -> None:
    """front: what the command begins with.  options: what it ends with, after the experiment."""
    path = getattr(task, "experiment", "")
    own = f" --experiment {shlex.quote(shown(path))}" if path else ""
    try:
        found = afterwards.of_stage(task.task_family, looked_at(path), lambda name: f"{front} {name}{own}{options}")
    except (UserError, StoreError, OSError):  # it is done all the same
        found = afterwards.Afterwards()
    say("", *found.lines(str(task)))


def _names(tasks: Iterable[luigi.Task]) -> str:
    """Those of stages, without groups of them, in the order of the alphabet."""
    names = {task.task_family for task in tasks if not isinstance(task, luigi.WrapperTask)}
    return ", ".join(sorted(names))
