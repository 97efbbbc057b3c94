"""Training on cached tensors: the frozen models and what trains are the only models in the process."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cache import write_atomically
from cache.terminal.places import shown
from pipeline.errors import NotFinite
from pipeline.estimate import preflight
from pipeline.exchange import modelspec
from pipeline.methods import kept, observed
from pipeline.plan import mode
from pipeline.plan.method import Trainee
from pipeline.plan.needs import note_needs
from pipeline.plan.plan import Plan
from pipeline.plan.run_folder import FOLDER, VERSION, RunFolder
from pipeline.process.progress import say
from pipeline.process.ranks import Ranks
from pipeline.runs import beside
from pipeline.sampling import growing
from pipeline.settings.experiment import settings_of
from pipeline.settings.fields import Train
from pipeline.settings.questions import questions
from pipeline.training import checkpoint, guard, loop, metrics, team
from pipeline.training.batches import Batches
from pipeline.training.loss import flow_loss, tensors_of
from pipeline.training.reminders import Reminders
from pipeline.training.schedules import depends_on_total


def train(plan: Plan) -> dict:
    """Train what the plan says on its cached tensors; weights and, last of all, result.json go to the run's folder.

    Goes on from the run's newest checkpoint, or from that of a run that differs in nothing but its length.  Returns
    what result.json says; where the run is done, its result stays as it is, and 0 steps are returned.  Raises UserError
    where the loss is not finite, where a frozen weight has changed, or where another process trains this run.

    Where this process is one of several ranks, all of them call it; the first one writes.
    """
    run, label = plan.run, plan.method.label
    with team.met(run) as ranks:
        if ranks.any(plan.is_trained):
            say(f"{label}: trained already, in {shown(run.path)}")
            return {"steps": 0}
        own = team.Team(plan, ranks)
        if ranks.is_first:
            begin(plan)
        batches = Batches(plan)
        settings = with_steps_and_mode(plan, batches)
        say(step_of(settings, ranks, batches.prior))
        frozen = plan.load_frozen()
        before = guard.frozen_digests(frozen)
        growth = growing.Growth(plan, ranks, settings.steps)
        growth.draw_base(frozen)
        trainee = plan.method.make(plan, frozen)
        say(describe(trainee))
        prepare(plan, trainee, settings)
        loss, to_tensors = flow_loss(trainee.predict), tensors_of(plan, *trainee.networks.values())
        first = to_tensors(batches.evaluation(0, settings.batch_size))
        found = observed.precision(plan, trainee, lambda: loss(*first))
        training = training_of(plan, loss, trainee, settings, own, batches.in_a_step)
        identity = checkpoint.identity_of(plan.decisive | {"mode": settings.mode})
        go_on(training, run, identity, settings, growing.kept_files(plan))
        training.check_equal()
        try:
            result = loop.run(
                training,
                batches.training,
                to_tensors,
                settings,
                run,
                identity,
                partial(say_first_step, plan, settings, trainee),
                _watched(growth, plan, trainee, training, settings),
                partial(kept.first_step, plan, trainee, identity),
            )
        except NotFinite:
            guard.check_finite(plan.model_folder, frozen)
            raise
        for component in frozen:
            plan.confirm(component)
        plan.method.confirm(plan)
        with own.refusing(run):
            guard.check_frozen(frozen, before, trainee.trained)
        made = training.result()
        if not ranks.is_first:
            return {"steps": settings.steps}
        path = trainee.save(run.path, made, _lineage(plan, settings.steps))
        result |= {"steps": settings.steps, "trained_parameters": sum(parameter.size for parameter in trainee.trained)}
        result |= {"mode": settings.mode, "precision": found, "numerics": training.numerics}
        write_atomically(run.result, json.dumps({"version": VERSION} | result, indent=2) + "\n")
    say(f"{label}: {shown(path)}")
    return result


def training_of(
    plan: Plan, loss: Callable, trainee: Trainee, settings: Train, own: team.Team, num_batches: int
) -> loop.Training:
    """What trains here, before its first step; where there are several ranks, this one's share of it."""
    share, of_trainee = own.share(trainee.trained), (trainee.groups, trainee.before_batch)
    read = kept.parameters(trainee)
    return loop.Training(loss, trainee.trained, settings, _is_scaled(plan), *of_trainee, share, num_batches, read)


def prepare(plan: Plan, trainee: Trainee, settings: Train) -> None:
    """See that there is room for what will be written, and have blocks computed again where memory is to be saved."""
    preflight.check_room(plan)
    if settings.gradient_checkpointing:
        for network in trainee.networks.values():
            plan.family.recompute_blocks(network)


def step_of(settings: Train, ranks: Ranks, prior: Reminders | None = None) -> str:
    """What one step is, for people."""
    batch, number = settings.batch_size, settings.accumulate
    said = f"a step: {batch * number} samples, {number} batch{'es' * (number > 1)} of {batch}"
    said += f", {number // ranks.size} on each of {ranks.size} ranks" if ranks.size > 1 else ""
    return said + (f"; and as many of the prior's {len(prior.pictures)} pictures" if prior else "")


def say_first_step(plan: Plan, settings: Train, trainee: Trainee, kept: Path | None) -> str:
    """Why the first step of each size of batch takes long, for people; "" where it does not.

    kept: where its graphs are taken from, if they are.
    """
    if settings.mode != "jit":
        return ""
    blocks = sum(len(plan.family.blocks_of(each)) for each in trainee.networks.values())
    return mode.compiling(plan.device, blocks, kept)


def begin(plan: Plan) -> None:
    """Say in the run's folder what the run is and what it needs of the store; and to people, what may not be meant."""
    for question in questions(plan.experiment, plan.method.name):
        say(question)
    said = settings_of(plan.experiment) | {FOLDER: str(plan.experiment.folder.resolve())}
    write_atomically(plan.run.experiment, json.dumps(said, indent=2) + "\n")
    note_needs(plan)


def _is_scaled(plan: Plan) -> bool:
    """Whether any part of the gradient is computed in float16, whose smallest numbers are not small enough."""
    passed_through = plan.method.frozen(plan.experiment, plan.family)
    return "fp16" in [plan.policy(component).compute for component in (*passed_through, "trained")]


def with_steps_and_mode(plan: Plan, batches: Batches) -> Train:
    """The settings, in which the number of steps and the mode, where they were left open, are decided and said."""
    settings = plan.experiment.train
    if settings.epochs:
        steps = max(1, batches.order.steps_in_epochs(settings.epochs) // settings.accumulate)
        settings = dataclasses.replace(settings, steps=steps)
    if settings.mode == "auto":
        chosen, reason = mode.choose(plan.device, settings, batches.num_shapes)
        say(f"mode: {chosen}, {reason}")
        return dataclasses.replace(settings, mode=chosen)
    if settings.gradient_checkpointing and settings.mode == "jit" and plan.device == "CPU":
        say('gradient_checkpointing saves no memory in compiled steps on CPU; mode = "pynative" does')
    return settings


def go_on(
    training: loop.Training, run: RunFolder, identity: dict, settings: Train, kept_files: tuple[str, ...] = ()
) -> None:
    """Restore the newest checkpoint that this run can go on from, its own or another's; say so.

    kept_files: of steps with pictures, which are taken over.

    Says what differs from the run of the same name that is most like it, where it goes on from none.
    Raises UserError where one of its own checkpoints is of another configuration.
    """
    own = checkpoint.newest(run, settings.steps)
    if own is not None:
        checkpoint.check_identity(own, identity)
        training.restore(own)
        say(f"going on from step {own.step}, {shown(own.path)}")
        return
    shorter = checkpoint.find_shorter(run, identity, settings.steps)
    if shorter is None:
        if anew := beside.why_anew(run, identity):
            say(anew)
        return
    differs_in_length = checkpoint.differing(shorter.identity, identity, checkpoint.AFTERWARDS)
    if differs_in_length and depends_on_total(settings.lr_scheduler):
        say(
            f"{shown(shorter.path)} is not used: with lr_scheduler = {settings.lr_scheduler} the learning rate of each "
            "step depends on the number of steps, so this run starts anew"
        )
        return
    if training.ranks.is_first:
        other = RunFolder(shorter.path.parent.parent)
        metrics.copy(other, run, shorter.step)
        growing.take_over(other, run, kept_files, shorter.step)
    training.restore(shorter)
    say(f"going on from step {shorter.step} of a shorter run, {shown(shorter.path)}")


def describe(trainee: Trainee) -> str:
    cells = dict(trainee.frozen) | dict(trainee.networks)
    total = sum(parameter.size for cell in cells.values() for parameter in cell.get_parameters())
    count = sum(parameter.size for parameter in trainee.trained)
    return f"{' and '.join(cells)}: {total:,} parameters, of which {count:,} train"


def _watched(
    growth: growing.Growth, plan: Plan, trainee: Trainee, training: loop.Training, settings: Train
) -> loop.Watch:
    """What draws while the training goes on, as the loop calls it."""

    def save(folder: Path, made: Mapping, step: int) -> Path:
        return trainee.save(folder, made, _lineage(plan, step))

    def draw(is_stopping: bool) -> bool:
        return growth.draw(training.step, trainee, save, training.result(), is_stopping)

    return loop.Watch(growth.is_due, draw)


def _lineage(plan: Plan, step: int) -> dict[str, str]:
    """Where the result comes from, for its safetensors metadata.  Names no path of this machine."""
    model, sizes = plan.experiment.model, plan.experiment.data.resolution
    most = max(sizes) if isinstance(sizes, tuple) else sizes
    resolution = f"{most}x{most}"
    return {
        "base_model": (model.path if isinstance(plan.experiment.model_path, str) else "") or plan.model_folder.name,
        "base_model_revision": model.revision,
        "base_model_digest": plan.network_digest["weights"],
        "run_id": plan.run_id,
        "recipes": json.dumps(plan.entry_ids),
        "precision": json.dumps(asdict(plan.precision), sort_keys=True),
        "step": str(step),
        **modelspec.constant(plan.config(plan.family.network), plan.method.name, plan.experiment.name, resolution),
    }
