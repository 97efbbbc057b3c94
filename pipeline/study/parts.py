"""What the child processes of a study compute: one model each, under one policy, on the sample; see `study`.

Of each comes a file of safetensors in float32, which holds what half types hold, be it finite or not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cache import write_tensors
from pipeline import encode
from pipeline.devices import device, dtypes, tensors
from pipeline.devices.tensors import to_storage
from pipeline.plan.method import untrained
from pipeline.plan.plan import Plan
from pipeline.process.progress import Progress
from pipeline.study.subject import (
    AGAINST,
    CAPTION_ENCODERS,
    DECODED,
    IMAGE_ENCODER,
    LOSSES,
    NETWORK,
    OWN,
    Job,
    Tensors,
    label,
)
from pipeline.training.batches import Batch, Batches
from pipeline.training.loss import tensors_of


def compute(job: Job) -> None:
    """Load the job's component, and write what it makes of the sample.  Raises UserError where it cannot."""
    plans = job.plans()
    plan = plans[job.side]
    device.use(plan.device, plan.experiment.device)
    with np.errstate(over="ignore"):  # it is counted, not warned of
        {NETWORK: _velocities, IMAGE_ENCODER: _images}.get(job.component, _captions)(job, plans)


def _captions(job: Job, plans: Mapping[str, Plan]) -> None:
    plan = plans[job.side]
    kind = CAPTION_ENCODERS[job.component]
    encoder, entries = encode.load_caption_encoder(plan, kind), plan.entries_of(kind)
    items, texts, _ = plan.captions
    arrays = (_as_stored(encoder(caption), entries.dtype) for caption in texts)
    _write(job.output(), dict.fromkeys(items, entries.shape), _counted(job, plan, arrays, len(items), "caption"))


def _images(job: Job, plans: Mapping[str, Plan]) -> None:
    """The posteriors; and on the reference's side the pictures that its VAE decodes of both sides' means."""
    plan = plans[job.side]
    encoder, needs = encode.load_picture_encoder(plan), plan.image_needs
    sources = [(need, photo) for need in needs for photo in need.photos]
    arrays = (_as_stored(encoder((photo, need.variant)), need.entries.dtype) for need, photo in sources)
    shapes = {photo.item: need.entries.shape for need, photo in sources}
    _write(job.output(), shapes, _counted(job, plan, arrays, len(sources), "image"))
    if job.side == AGAINST and job.output(OWN).exists():
        shapes = {photo.item: (3, need.variant.height, need.variant.width) for need, photo in sources}
        for side in (OWN, AGAINST):
            pictures = _decoded(encoder.model, plan, Tensors(job.output(side)), shapes)
            _write(job.output(side, DECODED), shapes, _counted(job, plan, pictures, len(shapes), "decoded image"))


def _decoded(vae, plan: Plan, posteriors: Mapping[str, np.ndarray], items: Iterable[str]) -> Iterator[np.ndarray]:
    """The posteriors' means as pixels in [0, 255], not rounded, (3, height, width)."""
    import mindspore as ms

    for item in items:
        mean = tensors.as_input(ms.Tensor(np.split(posteriors[item], 2)[0][None]), plan.policy(IMAGE_ENCODER))
        picture = to_storage(vae.decode(mean)[0], "float32")[0]
        yield np.clip((picture + 1) * 127.5, 0, 255)


def _velocities(job: Job, plans: Mapping[str, Plan]) -> None:
    """The velocities predicted from the reference's tensors, by the pair's number, and the losses on all inputs."""
    plan, found = plans[job.side], {}
    predict = _predictor(plan)
    for side in job.inputs:
        batches = Batches(plans[side])
        pairs = map(predict, (batches.evaluation(number, 1) for number in range(job.pairs)))
        results = list(_counted(job, plan, pairs, job.pairs, "pair"))
        found[f"{LOSSES} {side}"] = np.array([loss for _, loss in results])
        if side == AGAINST:
            found |= {str(number): velocity for number, (velocity, _) in enumerate(results)}
    _write(job.output(), {key: array.shape for key, array in found.items()}, found.values())


def _predictor(plan: Plan) -> Callable[[Batch], tuple[np.ndarray, float]]:
    """What the transformer predicts of a batch of one, (tokens, channels), and its loss."""
    network = plan.family.network
    model = untrained(plan, {network: plan.load(network)})
    policy, to_tensors, is_checked = plan.policy(network), tensors_of(plan, *model.networks.values()), False

    def predict(batch):
        nonlocal is_checked
        x, _, txt, pooled, timestep, img_ids, txt_ids, _, guidance = to_tensors(batch)
        output = model.predict(x, txt, pooled, timestep, img_ids, txt_ids, guidance)
        if not is_checked:
            dtypes.check(network, policy, dtypes.found_in(model.networks[network], output, policy))
            is_checked = True
        velocity = to_storage(output, "float32")
        return velocity[0], float(np.square(velocity - batch.target, dtype=np.float64).mean())

    return predict


def _as_stored(output, dtype: str) -> np.ndarray:
    """The one item of a batch as the store would keep it, widened to float32."""
    return to_storage(output[0], dtype).astype(np.float32)


def _counted(job: Job, plan: Plan, things: Iterable, total: int, unit: str) -> Iterator:
    """The things one after another, with progress."""
    name = f"{job.component}, {label(getattr(plan.precision, job.component))}"
    with Progress(name, total, unit) as progress:
        for thing in things:
            yield thing
            progress.advance()


def _write(path: Path, shapes: Mapping[str, Sequence[int]], arrays: Iterable[np.ndarray]) -> None:
    """Write the arrays, each when it is made."""
    tensors = {key: ("float32", shape) for key, shape in shapes.items()}
    write_tensors(path, tensors, (np.ascontiguousarray(array, np.float32) for array in arrays), {})
