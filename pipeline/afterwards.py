"""What there is once a stage is done: the files that it and those before it made, and what to do next.

Imports no MindSpore: Luigi's process says it at the end, also where nothing had to run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from cache.terminal.output import typed
from cache.terminal.places import shown
from cache.terminal.table import Table
from cache.terminal.words import count
from pipeline.methods import LORA, method_of
from pipeline.plan import needs, pictures
from pipeline.plan.method import Method
from pipeline.plan.plan import Plan
from pipeline.plan.survey import Survey
from pipeline.plan.whole import is_whole
from pipeline.runs.reading import read_run
from pipeline.stage_table import GROUPS, STAGES, Preparation, RoomCheck, Work

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Afterwards:
    """folder: that ``files`` are in; None: each names its own.  files: with what is in them.  todo: what, and how."""

    folder: Path | None = None
    files: Rows = field(default_factory=list)
    todo: Rows = field(default_factory=list)

    def lines(self, done: str) -> Iterator[str]:
        """For people.  done: the stage and its experiment, as TrainLoRA(cat)."""
        where = f", in {shown(self.folder)}/" if self.folder else ""
        yield f"{done} is done{where}"
        yield from _aligned(self.files)
        if self.todo:
            yield "Next:"
            yield from _aligned(self.todo)


def _aligned(rows: Rows) -> Iterator[str]:
    return (typed(f"  {line}") for line in Table(["", ""], rows).lines()) if rows else iter(())


def of_stage(name: str, survey: Survey, command: Callable[[str], str]) -> Afterwards:
    """After a stage, or a group of stages, that is done.  command: how a stage is run, by its name.

    Raises UserError, StoreError or OSError where what it looks at cannot be read.
    """
    names = GROUPS[name][1] if name in GROUPS else (name,)
    stage = STAGES[names[0]]
    if isinstance(stage, Preparation):
        return _preparation(stage, survey, command)
    method = stage.method if isinstance(stage, Work) and stage.method != LORA else method_of(survey.experiment)
    if isinstance(stage, RoomCheck):
        return Afterwards(todo=[(f"train the {stage.method.label}:", command(stage.method.stages.train))])
    plan, own = survey.plan(stage.method), stage.method.stages
    if name in (own.train, own.measure, own.decode, own.report):
        return Afterwards(plan.run.path, files_of_run(plan), list(_after_run(name, plan, survey, command)))
    if name == own.draw:
        return Afterwards(None, _entries(plan, names), [("see the pictures:", command(own.decode))])
    return Afterwards(None, _entries(plan, names), [(f"train a {method.label}:", command(method.stages.train))])


def _preparation(stage: Preparation, survey: Survey, command: Callable[[str], str]) -> Afterwards:
    experiment = survey.experiment
    if stage.name == "GetModel":
        files = [(shown(survey.plan(LORA).model_folder), "the pretrained model")]
    else:
        photos = survey.photos(LORA)
        files = [(f"{shown(experiment.images)}/", count(len(photos), "photo") if photos else "photos")]
    method = method_of(experiment)
    return Afterwards(None, files, [(f"train a {method.label}:", command(method.stages.train))])


def _entries(plan: Plan, names: tuple[str, ...]) -> Rows:
    """What of the store some stages made: a row for each recipe."""
    rows = []
    for need in needs.needed(plan):
        if need.stage in names:
            entries = plan.entries(need.recipe)
            what = count(len(need.items), need.recipe["kind"].removesuffix("s") + " tensor")
            rows.append((shown(entries.path), what))
    return rows


def files_of_run(plan: Plan) -> Rows:
    """The files in a run's folder that are of use to people, those that are there."""
    run, method = plan.run, plan.method
    found = read_run(run.path)
    loss = f", last loss {found.loss:.4f}" if found.loss is not None else ""
    num_pictures = len(plan.experiment.sample.prompts)
    result = method.result_files[0] if len(method.result_files) == 1 else f"{Path(method.result_files[0]).parent}/"
    about = {
        result: f"the {method.label}: {count(found.step, 'step')}{loss}",
        run.samples_grid.name: "its pictures, side by side: look at them",
        run.quick_grid.name: "a quick look at what it drew while it trained",
        f"{run.samples.name}/": f"the single pictures of {count(num_pictures, 'prompt')}",
        "steps/": f"the {method.label} as it was at each step with pictures",
        run.report.name: "all of it on one page: open it in a browser",
        run.loss.name: "the loss on the photos, before and after",
        run.metrics.name: "loss, learning rate, times of each step",
        f"{run.tensorboard.name}/": "the same, for TensorBoard",
        f"{run.checkpoints.name}/": "from where a training of more steps goes on",
    }
    return [(name, what) for name, what in about.items() if (run.path / name).exists()]


def _after_run(name: str, plan: Plan, survey: Survey, command: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    method, place = plan.method, quote(shown(plan.run.path))
    if name in (method.stages.train, method.stages.measure):
        yield _to_draw(method, survey, command)
    elif not is_whole(plan.run.report):
        yield "all on one page:", command(method.stages.report)
    elif not is_whole(plan.run.loss):
        yield "measure what it gained:", command(method.stages.measure)
    yield _to_look_at_curves(place)
    if name == method.stages.decode and (steps := plan.run.list_steps(method.result_files)):
        yield "if a step looks better:", f"python -m pipeline export {place} --checkpoint {steps[-1]}"
    if method == LORA:
        yield "for ComfyUI and others:", f"python -m pipeline export {place}"
    if how := method.loading(shown(plan.run.path)):
        yield "load it, in Python:", how
    yield "compare with other runs:", f"python -m pipeline runs {quote(shown(plan.run.path.parent))}"


def _to_draw(method: Method, survey: Survey, command: Callable[[str], str]) -> tuple[str, str]:
    if pictures.is_asked(survey.experiment, method):
        return "see what it draws:", command(method.stages.decode)
    missing = "prompts" + (" and conditions" if method.reads_conditions else "")
    return "see what it draws:", f"name {missing} in [sample], then {method.stages.decode}"


def _to_look_at_curves(place: str) -> tuple[str, str]:
    first = "" if find_spec("tensorboard") else "pip install tensorboard && "
    return "see its curves:", f"{first}tensorboard --logdir {place}"
