"""The embedded model through all stages, and its outputs beside those that were recorded on a CPU in float32.

    python -m pipeline doctor --record FILE       writes them anew; pipeline/doctor/golden.safetensors is kept so

The pictures are arithmetic and their files lossless, the noise is drawn on the host: nothing random is the device's.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from pipeline import stages
from pipeline.devices import device
from pipeline.devices.device import COMPUTES
from pipeline.doctor.finding import Finding, failed, ok
from pipeline.methods import LORA
from pipeline.plan import pictures
from pipeline.plan.plan import Plan, resolve
from pipeline.settings.reading import load_experiment
from pipeline.training.batches import Batches
from pipeline.training.loop import Training
from pipeline.training.loss import flow_loss, tensors_of

FILE = Path(__file__).with_name("golden.safetensors")
SIDE, STEPS = 64, 3
CAPTIONS = ("a red circle on a blue background", "a green square on a yellow background")
ENCODERS = ("CheckData", "EncodeCLIP", "EncodeT5", "EncodeImages")

EXPERIMENT = """
name = "doctor"
[paths]
store = "store"
runs = "{runs}"
[data]
images = "photos"
resolution = {side}
max_sequence_length = 24
[precision]
preset = "{preset}"
simulate = {simulate}
[lora]
rank = 2
alpha = 2.0
[train]
steps = {steps}
batch_size = 2
learning_rate = 1e-3
mode = "{mode}"
checkpoint_every = 2
[sample]
prompts = ["a blue triangle on a white background"]
num_inference_steps = 4
base = false
[device]
target = "{target}"
"""

TOLERANCES = {
    "CLIP": {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2},
    "T5": {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2},
    "VAE": {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2},
    "velocity": {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2},
    "gradient": {"fp32": 2e-4, "fp16": 2e-2, "bf16": 5e-2},
    "losses": {"fp32": 1e-4, "fp16": 5e-3, "bf16": 1e-2},
    "updates": {"fp32": 5e-3, "fp16": 1e-1, "bf16": 2.5e-1},
    "latents": {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2},
    "picture": {"fp32": 5e-3, "fp16": 1e-2, "bf16": 2e-2},
}
"""By the first word of an output's name: how far it may be from the golden one, as the root of the mean square of the
difference over that of the output.  Float32's allow for kernels that add up in another order; the halves' are about
five times what a CPU gives, in float16 and with bfloat16 simulated (docs/ascend.md has the figures)."""


def run(folder: Path, preset: str, target: str, mode: str = "pynative") -> tuple[dict[str, np.ndarray], list[Finding]]:
    """All outputs as float32 by name, and what repeating and resuming the training gave.  Call `device.use` before."""
    _write_photos(folder / "photos")
    plan = _resolved(folder, "runs", preset, target, mode)
    for stage in ENCODERS:
        stages.run(stage, plan.experiment)
    outputs = dict(_encoded(plan))
    outputs |= _first_step(plan)
    for stage in ("TrainLoRA", "SampleLatents", "Sample"):
        stages.run(stage, plan.experiment)
    plan = _resolved(folder, "runs", preset, target, mode)
    outputs |= _results(plan)
    other = _resolved(folder, "runs-again", preset, target, mode)
    stages.run("TrainLoRA", other.experiment)
    return outputs, [_same("the same training again", plan, other), _resumed(plan)]


def _write_photos(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    for number, caption in enumerate(CAPTIONS):
        red = (rows * 4 + 40 * number) % 256
        green = ((rows - SIDE // 2) ** 2 + (columns - SIDE // 2) ** 2 < (200 + 300 * number)) * 220
        blue = (columns * (3 + number)) % 256
        Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)


def _resolved(folder: Path, runs: str, preset: str, target: str, mode: str) -> Plan:
    path = folder / f"{runs}.toml"
    simulate = str(preset not in COMPUTES[target]).lower()
    values = {"runs": runs, "side": SIDE, "steps": STEPS, "preset": preset, "target": target, "mode": mode}
    path.write_text(EXPERIMENT.format(**values, simulate=simulate))
    return resolve(load_experiment(path), LORA)


def _encoded(plan: Plan) -> Iterator[tuple[str, np.ndarray]]:
    needs = plan.image_needs[0]
    for name, entries, items in (
        ("CLIP", plan.pooled, plan.captions.items),
        ("T5", plan.txt, plan.captions.items),
        ("VAE", needs.entries, needs.items),
    ):
        yield name, np.stack([entries.read(item) for item in sorted(items)]).astype(np.float32)


def _first_step(plan: Plan) -> dict[str, np.ndarray]:
    """The velocity that the model predicts for the first batch, and the gradient of the loss by kind of block."""
    frozen, batches = plan.load_frozen(), Batches(plan)
    trainee = plan.method.make(plan, frozen)
    tensors = tensors_of(plan, *trainee.networks.values())(batches.training(0))
    x, _, txt, pooled, timestep, img_ids, txt_ids, _, guidance = tensors
    velocity = trainee.predict(x, txt, pooled, timestep, img_ids, txt_ids, guidance, None)
    training = Training(flow_loss(trainee.predict), trainee.trained, plan.experiment.train)
    _, gradients = training.gradients([tensors])
    outputs = {"velocity": _float32(velocity)}
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        own = [
            _float32(gradient).ravel()
            for parameter, gradient in zip(trainee.trained, gradients)
            if parameter.name.startswith(kind) and "lora_B" in parameter.name
        ]
        outputs[f"gradient of {kind}"] = np.concatenate(own)
    return outputs


def _results(plan: Plan) -> dict[str, np.ndarray]:
    lines = [json.loads(line) for line in plan.run.metrics.read_text().splitlines()]
    weights = load_file(plan.run.path / plan.method.result_files[0])
    trained = pictures.trained(plan)
    (item,), (name,) = trained.pictures, pictures.file_names(plan, trained)
    with Image.open(plan.run.path / name) as picture:
        pixels = np.asarray(picture, np.float32)
    return {
        "losses of three steps": np.array([line["loss"] for line in lines], np.float32),
        "updates of three steps": np.concatenate(
            [weights[name].astype(np.float32).ravel() for name in sorted(weights) if "lora_B" in name]
        ),
        "latents of a sample": trained.entries.read(item).astype(np.float32),
        "picture of it": pixels,
    }


def _float32(tensor) -> np.ndarray:
    import mindspore as ms

    return tensor.astype(ms.float32).asnumpy()


def _same(what: str, plan: Plan, other: Plan) -> Finding:
    one, two = ((each.run.path / plan.method.result_files[0]).read_bytes() for each in (plan, other))
    if one == two:
        return ok(what, "equal to the last bit")
    todo = "[device] deterministic = true is what asks for equal bits; please send us this report"
    return failed(what, "another result", todo)


def _resumed(plan: Plan) -> Finding:
    """Take the run back to its checkpoint of step 2, and let it go on."""
    result = plan.run.path / plan.method.result_files[0]
    unbroken = result.read_bytes()
    for path in (result, plan.run.result, plan.run.checkpoint(STEPS)):
        path.unlink()
    stages.run("TrainLoRA", plan.experiment)
    if result.read_bytes() == unbroken:
        return ok("resumed after step 2", "equal to the last bit")
    return failed("resumed after step 2", "another result than unbroken", "please send us this report")


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The root of the mean square of the difference, over that of what is wanted; infinite where shapes differ."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    difference = np.square(found.astype(np.float64) - wanted).mean()
    return float(np.sqrt(difference / max(np.square(wanted.astype(np.float64)).mean(), 1e-30)))


def compared(outputs: dict[str, np.ndarray], golden: dict[str, np.ndarray], dtype: str) -> Iterable[Finding]:
    """A finding for each golden output.  dtype: "fp32", "fp16" or "bf16"."""
    for name in sorted(golden, key=lambda name: list(TOLERANCES).index(name.split()[0])):
        kind = name.split()[0]
        found, limit = distance(outputs[name], golden[name]), TOLERANCES[kind][dtype]
        said = f"{found:.1e} from the golden one, at most {limit:g}"
        yield ok(name, said) if found <= limit else failed(name, said, WRONG.get(kind, "please send us this report"))


WRONG = {
    "CLIP": "the text encoder computes wrongly: do not encode with this precision",
    "T5": "the text encoder computes wrongly: try [precision] text_encoder_2 = { compute = 'fp32' }",
    "VAE": "the VAE computes wrongly: do not encode with this precision",
}


def golden() -> dict[str, np.ndarray]:
    return load_file(FILE)


def record(path: Path) -> None:
    """Write the golden numbers of this machine's CPU."""
    device.use("CPU")
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        outputs, _ = run(Path(folder) / "model", "fp32", "CPU")
    save_file(outputs, path)
