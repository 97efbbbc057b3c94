"""The training recipe, recomputed in NumPy from the store's entries and the checkpoint's configs.

No number here comes from what is tested: `pipeline.training.batches`, `pipeline.flux.flow`, mindone's scheduler.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from lab import Lab

from cache import Entries, caption_item, digest
from pipeline import draws
from pipeline.data.variants import Variant
from pipeline.draws import Purpose
from pipeline.methods import LORA
from pipeline.plan.plan import Plan, resolve
from pipeline.training.batches import Batch, Batches
from pipeline.training.loss import tensors_of
from pipeline.training.order import Order

SEED = 11
CAPTIONS = (
    "a photo of a red cat",
    "a painting of a blue boat by the sea",
    "a drawing of a green tree in the snow",
    "a portrait of a white dog",
    "an old picture of a yellow car on a street",
)
NUM_PHOTOS, BATCH_SIZE, NUM_ROWS, TEXT_LENGTH = len(CAPTIONS), 3, 3, 12
CLOSE = dict(rtol=1e-5, atol=1e-5)
ARGUMENTS = ("x", "target", "txt", "pooled", "timestep", "img_ids", "txt_ids", "weight", "guidance")


def five_photos_lab(folder: Path, model: Path) -> Lab:
    """Five photos, five captions, encoded."""
    lab = Lab(folder, model, num_pictures=NUM_PHOTOS)
    lab.set("data", resolution=16 * NUM_ROWS, max_sequence_length=TEXT_LENGTH).set("train", batch_size=BATCH_SIZE)
    lab.write_captions([row | {"text": text} for row, text in zip(lab.captions(), CAPTIONS)])
    lab.settle()
    assert lab.encode() == dict.fromkeys(("EncodeCLIP", "EncodeT5", "EncodeImages"), NUM_PHOTOS)
    return lab


def plan_of(lab: Lab, seed: int = SEED, **tables) -> Plan:
    """The lab's plan with another seed and other settings, by table."""
    experiment = lab.experiment
    changed = {name: dataclasses.replace(getattr(experiment, name), **values) for name, values in tables.items()}
    return resolve(dataclasses.replace(experiment, seed=seed, **changed), LORA)


def batches_of(plan: Plan) -> Batches:
    return Batches(plan)


def a_batch(lab: Lab) -> Batch:
    return batches_of(plan_of(lab)).training(0)


# --- the recipe, written again ------------------------------------------------------------------------------------


def pairs_of(lab: Lab) -> list[tuple[str, str]]:
    """(address of the photo, its caption), in the order that content gives."""
    rows = lab.captions()
    return sorted((digest((lab.pictures / row["file_name"]).read_bytes()), row["text"]) for row in rows)


def packed(latents: np.ndarray) -> np.ndarray:
    """(channels, height, width) to (tokens, 4 * channels): patches of 2 x 2 in reading order, channel by channel."""
    channels, height, width = latents.shape
    corners = [(row, column) for row in range(0, height, 2) for column in range(0, width, 2)]
    offsets = [(channel, y, x) for channel in range(channels) for y in (0, 1) for x in (0, 1)]
    return np.array([[latents[c, row + y, column + x] for c, y, x in offsets] for row, column in corners])


def latents_of(lab: Lab, posterior: np.ndarray, eps: np.ndarray | float = 0.0) -> np.ndarray:
    """The transformer's latents, packed, from the VAE's posterior, whose mean they are where ``eps`` is 0."""
    vae = json.loads((lab.model / "vae" / "config.json").read_text())
    mean, log_variance = np.split(posterior.astype(np.float64), 2)
    return packed((mean + np.exp(0.5 * log_variance) * eps - vae["shift_factor"]) * vae["scaling_factor"])


def entries_of(plan: Plan) -> Entries:
    """The latents of every photo's only variant."""
    return plan.latents(Variant(16 * NUM_ROWS, 16 * NUM_ROWS))


def modes_of(lab: Lab, plan: Plan) -> np.ndarray:
    """The latents of every photo without sampling, (photos, tokens, channels), ordered as `pairs_of`."""
    return np.stack([latents_of(lab, entries_of(plan).read(photo)) for photo, _ in pairs_of(lab)])


def schedule(shift: float) -> np.ndarray:
    """Noise levels from 1 to 1/1000; ``shift`` moves them towards noise (arXiv:2403.03206, equation 23)."""
    sigma = (1000 - np.arange(1000)) / 1000
    return shift * sigma / (1 + (shift - 1) * sigma)


def recomputed(lab: Lab, plan: Plan, step: int) -> dict[str, np.ndarray]:
    """The batch of a training step, in float64; the checkpoint is in FLUX.1-dev's format, so that no shift applies."""
    settings, seed, pairs, entries = plan.experiment.train, plan.experiment.seed, pairs_of(lab), entries_of(plan)
    channels, height, width = entries.shape
    shape = (settings.batch_size, channels // 2, height, width)
    chosen = [pairs[index] for index in Order(seed, [0] * len(pairs), settings.batch_size).batch(step)]
    eps = draws.normal(seed, Purpose.POSTERIOR, step, shape) * (settings.posterior == "sample")
    latents = np.stack([latents_of(lab, entries.read(photo), e) for (photo, _), e in zip(chosen, eps)])
    noise = np.stack([packed(item) for item in draws.normal(seed, Purpose.NOISE, step, shape).astype(np.float64)])
    levels = np.floor(draws.generator(seed, Purpose.SIGMA, step).random(settings.batch_size) * 1000).astype(int)
    sigma = schedule(shift=1)[levels]
    return {
        "x": (1 - sigma)[:, None, None] * latents + sigma[:, None, None] * noise,
        "target": noise - latents,
        "txt": np.stack([plan.txt.read(caption_item(caption)) for _, caption in chosen]),
        "pooled": np.stack([plan.pooled.read(caption_item(caption)) for _, caption in chosen]),
        "timestep": sigma,
        "img_ids": np.array([[0, row, column] for row in range(height // 2) for column in range(width // 2)]),
        "txt_ids": np.zeros((plan.txt.shape[0], 3)),
        "weight": np.ones(settings.batch_size),
    }


def predicted(transformer, values: dict, guidance: float) -> np.ndarray:
    """The model's velocity for arrays or tensors by our names, each given under the model's own name."""
    import mindspore as ms

    own_names = {
        "x": "hidden_states",
        "txt": "encoder_hidden_states",
        "pooled": "pooled_projections",
        "timestep": "timestep",
        "img_ids": "img_ids",
        "txt_ids": "txt_ids",
    }
    inputs = {own: ms.Tensor(np.asarray(values[name], np.float32)) for name, own in own_names.items()}
    inputs["guidance"] = ms.Tensor(np.full(len(values["x"]), guidance, np.float32))
    return transformer(**inputs)[0].asnumpy().astype(np.float64)


# --- what is changed, and what is passed on -----------------------------------------------------------------------


def edit(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors(plan: Plan, transformer, batch: Batch) -> dict:
    return dict(zip(ARGUMENTS, tensors_of(plan, transformer)(batch), strict=True))
