"""Running a task on several devices: a worker of Luigi for each, all of one scheduler, until all is done.

With a central scheduler the exit codes of single workers say little: a worker for which nothing was left ends as one
whose scheduler has forgotten everything does.  So the task itself is asked whether it is complete, and scheduled again
until it is.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cache.terminal.output import say_below
from pipeline.process import children, several
from pipeline.process.children import GRACE_SECONDS, environment, interrupted_by_sigterm
from pipeline.process.progress import say
from pipeline.process.stopping import INTERRUPTED_EXIT
from pipeline.settings.reading import load_experiment
from tasks import central, endings, table
from tasks.manners import EXIT_CODES
from tasks.process import KEPT

FAILURES = EXIT_CODES["task_failed"], EXIT_CODES["scheduling_error"]
"""Exit codes of workers that another pass would not mend: the scheduler has tried again already."""

SHORT_SECONDS = 30
MOST_SHORT_PASSES = 12
"""So many passes in a row that end at once are taken for the sign that nothing more comes of them."""

MOST_DEATHS = 5
"""How often the worker of a device is started again in a pass after it was killed."""

PAUSE_SECONDS, LONG_PAUSE_SECONDS = 5, 30
"""Between two passes; the longer one where another host is at what is left."""


@dataclass(frozen=True)
class Goal:
    """What is to be complete.

    name: for people.  words: of the ``luigi`` command, its task and the task's parameters.  is_complete: looks anew.
    encoders: as [parallel] says.  say_done: is told the options that the command had besides.
    """

    name: str
    words: list[str]
    is_complete: Callable[[], bool]
    encoders: int
    say_done: Callable[[str], None]


def launch(task: str, experiment: str, numbers: list[str], scheduler_url: str = "") -> int:
    """Run a task and all that it needs, a worker on each device.  Returns the exit code: 0 once all of it is there."""
    path = dict(table.TASKS[task].get_params())["experiment"].parse(experiment)

    def say_done(options: str) -> None:
        endings.say_done(table.TASKS[task](path), table.survey_anew, "python -m tasks run", options)

    words = [task, *(["--experiment", path] if path else [])]
    encoders = load_experiment(path).parallel.encoders
    return reach(Goal(task, words, lambda: table.is_complete(task, path), encoders, say_done), numbers, scheduler_url)


def reach(goal: Goal, numbers: list[str], scheduler_url: str = "") -> int:
    """Have workers, one on each device, work until all is done.  Returns the exit code: 0 once it is."""
    options = f" --devices {','.join(numbers)}" + (f" --scheduler-url {scheduler_url}" if scheduler_url else "")
    try:
        with interrupted_by_sigterm():
            if goal.is_complete():
                goal.say_done(options)
                return 0
            _say_what_idles(goal.encoders, len(numbers))
            with central.found(scheduler_url, len(numbers)) as scheduler:
                code = _until_complete(goal, numbers, scheduler)
            if code == 0:
                goal.say_done(options)
            return code
    except KeyboardInterrupt:
        say_below(f"interrupted, and all workers; {KEPT}")
        return INTERRUPTED_EXIT


def _say_what_idles(encoders: int, num_devices: int) -> None:
    if encoders < num_devices:
        found = f"[parallel] encoders = {encoders}: no more devices than that encode the same kind of thing at a time"
        say(f"{found}; {num_devices} are named, encoders = {num_devices} would use them all", to_stderr=True)


def _until_complete(goal: Goal, numbers: list[str], scheduler: central.Scheduler) -> int:
    num_short = 0
    while True:
        began = time.monotonic()
        codes = _Pass(goal.words, numbers, scheduler).codes()
        if goal.is_complete():
            return 0
        if failures := [code for code in codes if code in FAILURES]:
            return max(failures)
        is_elsewhere = EXIT_CODES["already_running"] in codes
        is_short = time.monotonic() - began < SHORT_SECONDS and not is_elsewhere
        num_short = num_short + 1 if is_short else 0
        if num_short == MOST_SHORT_PASSES:
            reason = f"is not complete, and {num_short} times nothing came of running it; look at {scheduler.url}"
            say(f"error: {goal.name}: {reason}", to_stderr=True)
            return max([*codes, EXIT_CODES["not_run"]])
        time.sleep(LONG_PAUSE_SECONDS if is_elsewhere else PAUSE_SECONDS)
        scheduler.keep_up()
        scheduler.wait(central.SILENT_SECONDS)


class _Pass:
    """A worker for each device, until none of them finds anything to do."""

    def __init__(self, words: list[str], numbers: list[str], scheduler: central.Scheduler):
        self._command = [sys.executable, "-P", "-m", "tasks.worker", str(os.getpid()), "--module", "tasks"]
        self._command += [*words, "--scheduler-url", scheduler.url]
        self._scheduler, self._are_several = scheduler, len(numbers) > 1
        self._workers = {number: self._start(number) for number in numbers}

    def codes(self) -> list[int]:
        """Wait for all workers.  Returns their exit codes.  Whatever ends this wait ends the workers too."""
        codes: list[int] = []
        deaths: Counter[str] = Counter()
        try:
            while self._workers:
                self._scheduler.keep_up()
                for number, worker in list(self._workers.items()):
                    if (code := worker.poll()) is None:
                        continue
                    del self._workers[number]
                    if code < 0 and deaths[number] < MOST_DEATHS:
                        say(f"device {number}: the worker was {children.reason(code)}; started again", to_stderr=True)
                        deaths[number] += 1
                        self._workers[number] = self._start(number)
                    else:
                        codes.append(code)
                time.sleep(0.2)
        except BaseException:
            children.stop(list(self._workers.values()), GRACE_SECONDS + 10)
            raise
        return codes

    def _start(self, number: str) -> subprocess.Popen:
        output = subprocess.PIPE if self._are_several else None
        worker = subprocess.Popen(
            self._command,
            env={**environment(), several.VISIBLE: number},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # Ctrl-C reaches this process alone, which passes it on
        )
        several.say_lines_of(worker, f"device {number}: ")
        return worker
