"""``python -m benchmarks.step``: what a LoRA step costs, in PyNative and compiled, and where the time goes.

Both modes run in one process on the same model, batch and weights, in turns, so that a busy machine slows both; read
the ratios rather than the milliseconds.
"""

import argparse
import json
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.figures import Figure, in_child

LEARNING_RATE = 1e-4
PARTS = ("step", "forward", "forward and backward", "optimizer")
MODES = ("pynative", "jit")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds per turn; medians are printed")
    parser.add_argument("--turns", type=int, default=3, help="how often each part has its turn")
    parser.add_argument("--json", action="store_true")
    add_shape(parser)
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, indent=2) if options.json else table(result))


def add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-tokens", type=int, default=64, help="64 is a picture of 128 x 128 pixels")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--width", type=int, default=128, help="of the transformer, a multiple of 32")
    parser.add_argument("--blocks", type=int, default=2, help="double blocks, and as many single ones")


def figures(rounds: int, **shape) -> Iterator[Figure]:
    """What a compiled step costs by PyNative's, and compiling by one step of PyNative."""
    seconds, first = in_child(timed, argparse.Namespace(turns=rounds, rounds=5, **shape))
    by_turn = {key: np.median(values, axis=1) for key, values in seconds.items()}
    for part in PARTS:
        yield Figure.of(part, "PyNative's", by_turn["jit", part], by_turn["pynative", part])
    yield Figure.of("compiling", "PyNative's step", [first["jit"]], [np.median(by_turn["pynative", "step"])])


def measure(options) -> dict:
    """Median seconds of each part of a step in both modes, and the seconds of the first call, which compiles."""
    seconds, first = timed(options)
    medians = {f"{mode} {part}": float(np.median(values)) for (mode, part), values in seconds.items()}
    return {"seconds": medians, "first_call_seconds": first, "options": vars(options)}


def timed(options) -> tuple[dict, dict]:
    """Seconds of each (mode, part) of a step: (turns, rounds); and of each mode's first call, which compiles."""
    from pipeline.devices import device

    device.use("CPU")
    parts, compiling = {}, {}
    for mode in MODES:
        training, arguments, loss = prepare(options, mode)
        began = time.perf_counter()
        training.advance([arguments]).read()
        compiling[mode] = time.perf_counter() - began
        parts |= {(mode, name): part for name, part in parts_of(training, arguments, loss).items()}
    times = {key: np.empty((options.turns, options.rounds)) for key in parts}
    for turn in range(options.turns):
        for key, part in parts.items():
            part()
            for place in range(options.rounds):
                began = time.perf_counter()
                part()
                times[key][turn, place] = time.perf_counter() - began
    return times, compiling


def parts_of(training, arguments: tuple, loss) -> dict:
    """What is timed; each waits for all of its results, which a compiled graph may still be computing."""

    def gradient():
        (value,), _ = training.gradients([arguments])
        return value.asnumpy()

    _, gradients = training.gradients([arguments])
    return {
        "step": lambda: training.advance([arguments]).read(),
        "forward": lambda: loss(*arguments).asnumpy(),
        "forward and backward": gradient,
        "optimizer": lambda: float(training.optimizer.update(gradients, [LEARNING_RATE])),
    }


def prepare(options, mode: str, checkpointing: bool = False):
    """The training of one mode, the arguments of its batch, and the loss alone in that mode."""
    import mindspore as ms

    from pipeline.devices import device
    from pipeline.devices.precision import Policy
    from pipeline.flux import models
    from pipeline.flux.prediction import prediction
    from pipeline.methods import lora_layers as lora
    from pipeline.settings.fields import Lora, Train
    from pipeline.training import loop
    from pipeline.training.loss import flow_loss

    transformer = random_transformer(options)
    trained = lora.inject(transformer, Lora(), Policy("fp32", "fp32", "fp32"), seed=0)
    if checkpointing:
        models.recompute_blocks(transformer)
    loss = flow_loss(prediction(transformer))
    training = loop.Training(loss, trained, Train(mode=mode, learning_rate=LEARNING_RATE))
    batch = tuple(ms.Tensor(array) for array in random_batch(options))
    return training, batch, device.compiled(loss) if mode == "jit" else loss


def random_transformer(options):
    """Frozen, the same whenever it is made."""
    from pipeline.flux import tiny

    transformer = tiny.transformer(options.blocks, options.blocks, options.width)
    tiny.randomize(transformer, "transformer", seed=0)
    for parameter in transformer.get_parameters():
        parameter.requires_grad = False
    return transformer.set_train(False)


def random_batch(options) -> list[np.ndarray]:
    """The arguments of `pipeline.training.loss.flow_loss`, float32."""
    generator = np.random.default_rng(0)
    batch, image, text = options.batch_size, options.image_tokens, options.text_tokens
    normal = (
        generator.standard_normal(shape)
        for shape in ((batch, image, 64), (batch, image, 64), (batch, text, 96), (batch, 64))
    )
    sigma, guidance = generator.random(batch), np.full(batch, 3.5)
    ids = np.stack([np.zeros(image), np.arange(image) // 8, np.arange(image) % 8], axis=-1)
    arrays = (*normal, sigma, ids, np.zeros((text, 3)), np.ones(batch), guidance)
    return [np.asarray(array, np.float32) for array in arrays]


def table(result: dict) -> str:
    seconds, first = result["seconds"], result["first_call_seconds"]
    lines = [f"{'milliseconds, medians':<24}{'PyNative':>10}{'compiled':>10}{'ratio':>8}"]
    for part in PARTS:
        slow, fast = seconds[f"pynative {part}"] * 1e3, seconds[f"jit {part}"] * 1e3
        lines.append(f"{part:<24}{slow:>10.1f}{fast:>10.1f}{slow / fast:>8.1f}")
    repaid = (first["jit"] - first["pynative"]) / (seconds["pynative step"] - seconds["jit step"])
    lines.append(
        f"first call: PyNative {first['pynative']:.1f} s, compiled {first['jit']:.1f} s: repaid by {repaid:.0f} steps"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
