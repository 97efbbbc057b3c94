"""``python -m tasks sweep``: every combination of some settings' values, encoded once, each trained, all compared."""

import argparse
from collections.abc import Sequence

from luigi.cmdline import luigi_run

from cache import StoreError, printable_lines
from cache.terminal.output import show
from cache.terminal.places import shown
from cache.terminal.table import Table
from cache.terminal.words import count
from pipeline import stages
from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.methods import method_of
from pipeline.plan import pictures
from pipeline.plan.method import Method
from pipeline.plan.plan import device_and_precision
from pipeline.plan.survey import Survey
from pipeline.process.progress import say
from pipeline.process.stopping import INTERRUPTED_EXIT
from pipeline.settings.experiment import Experiment
from pipeline.settings.reading import load_experiment
from pipeline.stage_table import STAGES
from pipeline.sweep import files
from pipeline.sweep.asked import axes
from pipeline.sweep.combinations import Combination, asked_about, combinations
from tasks import launch, sweep_end
from tasks.sweep import OF_RUNS, Sweep


class Words(argparse.Action):
    """Keeps --set and --with in the order in which they stand."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.words = [*(namespace.words or []), (self.option_strings[0], values)]


def sweep(options: argparse.Namespace) -> int:
    try:
        return _sweep(options)
    except (UserError, StoreError) as error:
        say(f"error: {printable_lines(str(error))}", to_stderr=True)
        return 1


def _sweep(options: argparse.Namespace) -> int:
    experiment = load_experiment(options.experiment)
    if not options.words:
        raise UserError("nothing to sweep; say it as --set train.learning_rate=1e-4,3e-4 --set lora.rank=4,16")
    several = combinations(experiment, axes(options.words))
    tasks = options.task or [_usual_task(experiment)]
    _check(several, tasks)
    say(f"{count(len(several), 'experiment')}, each to {' and '.join(tasks)}; in {shown(files.folder_of(experiment))}/")
    for question in asked_about(several):
        say(question)
    if options.dry_run:
        show(_states(several, tasks))
        return 0
    path = str(files.write(experiment, several, tasks).path.absolute())
    if options.devices:
        return _run_by_several(Sweep(path), experiment.parallel.encoders, options)
    return _run(path, options.scheduler_url)


def _usual_task(experiment: Experiment) -> str:
    method = method_of(experiment)
    return method.stages.decode if pictures.is_asked(experiment, method) else method.stages.train


def _check(several: Sequence[Combination], tasks: Sequence[str]) -> None:
    """Raise UserError where an experiment could not be begun; what needs photos or the model is seen later."""
    if len({OF_RUNS[name].name for name in tasks}) > 1:
        raise UserError(f"--task: {' and '.join(tasks)} are of different methods; sweep one after the other")
    for each in several:
        chosen, _ = device_and_precision(each.experiment)
        device.check_present(chosen)
        if any(getattr(STAGES[name], "is_of_pictures", False) for name in tasks):
            pictures.check(each.experiment, OF_RUNS[tasks[0]])


def _states(several: Sequence[Combination], tasks: Sequence[str]) -> Table:
    """What is there already of each, as the next command would find it."""
    method = OF_RUNS[tasks[0]]
    return Table(["experiment", "state"], [[each.name, _state(each.experiment, method, tasks)] for each in several])


def _state(experiment: Experiment, method: Method, tasks: Sequence[str]) -> str:
    survey = Survey(experiment)
    try:
        if survey.photos(method) is None:
            return sweep_end.TO_DO
        is_done = all(stages.is_done(name, survey) for name in tasks)
        return sweep_end.state_of(survey.plan(method), is_done)
    except sweep_end.FAULTS:  # no model yet
        return sweep_end.TO_DO


def _run(path: str, scheduler_url: str) -> int:
    """By one worker, this process.  Luigi has to be the first to make the task: see `scheduler.choose`."""
    url = ["--scheduler-url", scheduler_url] if scheduler_url else []
    try:
        luigi_run(["--module", "tasks", Sweep.get_task_family(), "--sweep", path, *url])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def _run_by_several(task: Sweep, encoders: int, options: argparse.Namespace) -> int:
    words = [task.task_family, "--sweep", task.sweep]
    goal = launch.Goal(repr(task), words, task.is_complete_now, encoders, lambda _: task.say_end())
    code = launch.reach(goal, options.devices, options.scheduler_url)
    if code not in (0, INTERRUPTED_EXIT):
        task.say_end()
    return code
