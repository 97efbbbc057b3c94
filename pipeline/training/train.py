"""Training on cached tensors: the transformer is the only model in the process."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cache import write_atomically
from pipeline.data import indexing
from pipeline.devices import dtypes
from pipeline.estimate import preflight
from pipeline.flux import models
from pipeline.methods import controlnet, lora
from pipeline.plan import mode, pictures
from pipeline.plan.plan import CONTROLNET, LORA, RESULT_NAME, Plan
from pipeline.settings.fields import Train
from pipeline.training import guard, loop, metrics, resume
from pipeline.training.batches import Batches
from pipeline.training.loss import flow_loss, tensors_of
from pipeline.training.schedules import depends_on_total

NAMES = {LORA: "LoRA", CONTROLNET: "ControlNet"}


@dataclass(frozen=True)
class Subject:
    """What is trained beside or inside a frozen transformer.

    networks: the models that predict, by name; their blocks are what checkpointing recomputes.  trained, groups: as
    `loop.Training` takes them.  layer: one that trains, by name, whose output shows what they compute in.  loss: as
    of `flow_loss`.  save: takes the run's folder, the trained parameters by name, and metadata; writes the result and
    returns its path.  before_batch: called with the number of each batch.
    """

    networks: dict
    trained: list
    groups: list
    layer: tuple[str, object]
    loss: Callable
    save: Callable[[Path, Mapping, dict], Path]
    before_batch: Callable[[int], object] = int


def train(plan: Plan, photos: Sequence[indexing.IndexedPhoto], folder: Path) -> dict:
    """Train what the plan says on the photos' cached tensors; weights and, last of all, result.json go to ``folder``.

    Goes on from the run's newest checkpoint, or from that of a run that differs in nothing but its length.  Returns
    what result.json says; where the run is done, its result stays as it is, and 0 steps are returned.  Raises UserError
    where the loss is not finite, where a frozen weight has changed, or where another process trains this run.
    """
    batches = Batches(plan, photos, clip_tokens(plan, photos))
    settings = settle(plan, batches)
    with loop.locked(folder):
        if pictures.is_trained(folder, plan.trains):
            print(f"{NAMES[plan.trains]}: trained already, in {folder}", flush=True)
            return {"steps": 0}
        frozen = load_frozen(plan)
        before = guard.frozen_digests(frozen)
        subject = SUBJECTS[plan.trains](plan, frozen)
        print(describe(frozen, subject), flush=True)
        if settings.mode == "jit":
            num_blocks = sum(len(models.blocks_of(network)) for network in subject.networks.values())
            print(mode.compiling(plan.device, num_blocks, batches.num_shapes), flush=True)
        preflight.check_room(plan, photos)
        if settings.gradient_checkpointing:
            for network in subject.networks.values():
                models.recompute_blocks(network)
        to_tensors = tensors_of(plan, *subject.networks.values())
        first = to_tensors(batches.evaluation(0, settings.batch_size))
        name, layer = subject.layer
        trained = {name: (layer, subject.trained)}
        found = dtypes.precision(plan, photos, frozen, trained, lambda: subject.loss(*first))
        training = loop.Training(
            subject.loss, subject.trained, settings, _is_scaled(plan), subject.groups, subject.before_batch
        )
        identity = resume.identity_of(plan.decisive(photos) | {"mode": settings.mode})
        go_on(training, folder, identity, settings)
        result = loop.run(training, batches.training, to_tensors, settings, folder, identity)
        for component in frozen:
            plan.confirm(component)
        path = subject.save(folder, training.result, _lineage(plan, photos, settings))
        guard.check_frozen_or_discard(frozen, before, path)
        result |= {"steps": settings.steps, "trained_parameters": sum(parameter.size for parameter in subject.trained)}
        result |= {"mode": settings.mode, "precision": found}
        write_atomically(folder / RESULT_NAME, json.dumps(result, indent=2) + "\n")
    print(f"{NAMES[plan.trains]}: {path}", flush=True)
    return result


def _lora(plan: Plan, frozen: dict) -> Subject:
    adapted = lora.Adapted(frozen, plan.experiment.lora, plan.precision.trained, plan.experiment.seed)
    dropouts = adapted.add_dropout()
    networks = {lora.TRANSFORMER: frozen[lora.TRANSFORMER]}
    loss, layer = flow_loss(**frozen), (LORA, adapted.first_layer())
    return Subject(networks, adapted.trained, adapted.groups, layer, loss, adapted.save, dropouts.reseed)


def _controlnet(plan: Plan, frozen: dict) -> Subject:
    transformer, settings = frozen[lora.TRANSFORMER], plan.experiment.controlnet
    network = controlnet.make(transformer, plan.experiment, plan.precision.trained)
    plan.confirm_init()
    trained = list(network.get_parameters())
    loss = flow_loss(transformer, controlnet=network, conditioning_scale=settings.conditioning_scale)

    def save(folder, result, metadata):
        return controlnet.save(network, folder, result, settings.save_dtype, metadata)

    networks = {lora.TRANSFORMER: transformer, controlnet.FOLDER: network}
    layer = CONTROLNET, [*network.controlnet_blocks, *network.controlnet_single_blocks][0]
    return Subject(networks, trained, [0] * len(trained), layer, loss, save)


SUBJECTS = {LORA: _lora, CONTROLNET: _controlnet}


def load_frozen(plan: Plan) -> dict:
    """The frozen models that a training works with, by the prefix of their diffusers keys."""
    names = (lora.TRANSFORMER, lora.TEXT_ENCODER) if _trains_clip(plan) else (lora.TRANSFORMER,)
    return {name: models.load_component(plan, name) for name in names}


def _trains_clip(plan: Plan) -> bool:
    return plan.trains == LORA and plan.experiment.lora.train_text_encoder


def _is_scaled(plan: Plan) -> bool:
    return "fp16" in (plan.precision.transformer.compute, plan.precision.trained.compute)


def clip_tokens(plan: Plan, photos: Sequence[indexing.IndexedPhoto]) -> Callable | None:
    """Where CLIP trains: its tokens, (length,), int32, by a caption's address, made when they are asked for."""
    if not _trains_clip(plan):
        return None
    items, texts, _ = plan.captions(photos)
    captions = dict(zip(items, texts))
    tokenizer, length = models.load_component(plan, "tokenizer"), plan.pooled.recipe["max_length"]

    def tokens(item: str) -> np.ndarray:
        found = tokenizer(captions[item], padding="max_length", max_length=length, truncation=True)
        return np.array(found.input_ids, np.int32)

    return tokens


def settle(plan: Plan, batches: Batches) -> Train:
    """The settings with what they leave open decided: the number of steps, and the mode, which is said."""
    settings = plan.experiment.train
    if settings.epochs:
        steps = max(1, batches.order.steps_in_epochs(settings.epochs) // settings.accumulate)
        settings = dataclasses.replace(settings, steps=steps)
    if settings.mode == "auto":
        chosen, reason = mode.choose(plan.device, settings, batches.num_shapes)
        print(f"mode: {chosen}, {reason}", flush=True)
        return dataclasses.replace(settings, mode=chosen)
    if settings.gradient_checkpointing and settings.mode == "jit" and plan.device == "CPU":
        print('gradient_checkpointing saves no memory in compiled steps on CPU; mode = "pynative" does', flush=True)
    return settings


def go_on(training: loop.Training, folder: Path, identity: dict, settings: Train) -> None:
    """Restore the newest checkpoint that this run can go on from, its own or another's; say so.

    Raises UserError where one of its own is of another configuration.
    """
    own = resume.newest(folder, settings.steps)
    if own is not None:
        resume.check_identity(own, identity)
        training.restore(own)
        print(f"going on from step {own.step}, {own.path}", flush=True)
        return
    shorter = resume.find_shorter(folder, identity, settings.steps)
    if shorter is None:
        return
    is_longer = resume.differing(shorter.identity, identity, resume.AFTERWARDS)
    if is_longer and depends_on_total(settings.lr_scheduler):
        print(
            f"{shorter.path} is not used: with lr_scheduler = {settings.lr_scheduler} the learning rate of each step "
            "depends on the number of steps, so this run starts anew"
        )
        return
    metrics.copy(shorter.path.parent.parent, folder, shorter.step)
    training.restore(shorter)
    print(f"going on from step {shorter.step} of a shorter run, {shorter.path}", flush=True)


def describe(frozen: dict, subject: Subject) -> str:
    cells = frozen | subject.networks
    total = sum(parameter.size for cell in cells.values() for parameter in cell.get_parameters())
    count = sum(parameter.size for parameter in subject.trained)
    return f"{' and '.join(cells)}: {total:,} parameters, of which {count:,} train"


def _lineage(plan: Plan, photos, settings: Train) -> dict[str, str]:
    """Where the result comes from, for its safetensors metadata.  Names no path of this machine."""
    model = plan.experiment.model
    return {
        "base_model": (model.path if isinstance(plan.experiment.model_path, str) else "") or plan.checkpoint.name,
        "base_model_revision": model.revision,
        "base_model_digest": plan.transformer_digest["weights"],
        "run_id": plan.run_id(photos),
        "recipes": json.dumps(plan.entry_ids(photos)),
        "precision": json.dumps(asdict(plan.precision), sort_keys=True),
        "step": str(settings.steps),
    }
