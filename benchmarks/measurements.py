"""What `python -m benchmarks` measures."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

SMALL_MODEL = {"batch_size": 4, "image_tokens": 64, "text_tokens": 32, "width": 128, "blocks": 2}


@dataclass(frozen=True, eq=False)
class Measurement:
    """``benchmarks.NAME``, whose ``figures(rounds, **sizes)`` gives figures, each as soon as it is there.

    rounds, quick: how many are measured, without and with --quick; 0 leaves the measurement out.
    sizes: what makes two figures comparable; it is kept with them, and is the same with --quick.
    """

    name: str
    what: str
    rounds: int
    quick: int
    sizes: dict = field(default_factory=dict)
    needs_torch: bool = False

    @property
    def figures(self) -> Callable:
        return importlib.import_module(f"benchmarks.{self.name}").figures


ALL = (
    Measurement("store", "writing and reading entries", 5, 3),
    Measurement("index", "opening a store of many entries", 5, 3, {"num_items": 100_000}),
    Measurement("digests", "the first look at a checkpoint", 5, 3, {"files": 3, "megabytes": 128}),
    Measurement("start", "starting and ending a stage's process", 5, 3),
    Measurement("step", "a LoRA step, compiled", 5, 3, SMALL_MODEL),
    Measurement("against_torch", "a LoRA step beside PyTorch's", 7, 5, SMALL_MODEL, needs_torch=True),
    Measurement("encoders", "CLIP, T5 and the VAE beside PyTorch's", 5, 3, needs_torch=True),
    Measurement("sampling", "drawing beside FluxPipeline", 5, 3, {"steps": 20}, needs_torch=True),
    Measurement("loading", "loading a transformer", 5, 3, {"blocks": (1, 2)}),
    Measurement("ranks", "exchanging gradients", 2, 0, {"rank": 64, "steps": 10}),
    Measurement("photos", "a stage with many photos", 2, 0, {"photos": 20_000}),
    Measurement("shards", "encoding in shards", 2, 0, {"photos": 400, "resolution": 128}),
    Measurement("sweep", "a sweep of six", 1, 0, {"photos": 24, "resolution": 64, "steps": 10}),
)
