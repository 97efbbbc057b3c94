"""``python -m benchmarks.ranks``: what ranks spend on exchanging gradients, of the time of a LoRA's compiled step.

For each number of ranks and each reduction, so many processes of this program train together on random weights, one
batch each at a step.  "exchange" is laying gradients end to end, the collective operations, adding up and taking apart;
"waiting" is for the slowest rank, and on a machine with fewer cores than ranks it is most of the rest.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure
from benchmarks.step import LEARNING_RATE, add_shape, random_batch, random_transformer

FIRST = 3
"""Steps that do not count."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA (4): what is exchanged grows with it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--reduce", choices=("ordered", "fast"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # a file for the seconds of all steps, instead of a line
    add_shape(parser)
    options = parser.parse_args()
    from pipeline.process import launching, ranks

    if ranks.is_rank():
        train(options)
        return 0
    print(
        f"{'ranks':>5} {'reduce':>8}{'received':>12}{'step':>10}{'waiting':>10}{'exchange':>10}{'share':>8}", flush=True
    )
    for count in options.ranks:
        for reduce in ("ordered", "fast"):
            if code := launching.run([*sys.argv[1:], "--reduce", reduce], count, module="benchmarks.ranks"):
                return code
    return 0


def figures(rounds: int, steps: int, **sizes) -> Iterator[Figure]:
    """What the exchange takes of a step of two ranks; a round starts both anew."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    for reduce in ("ordered", "fast"):
        rows = [rows_of([*options, f"--steps={steps}", f"--reduce={reduce}"], 2) for _ in range(rounds)]
        steps_taken = np.array([np.median(each, axis=0) for each in rows])
        yield Figure.of(f"exchange, {reduce}", "the step", steps_taken[:, 2], steps_taken[:, 0])


def rows_of(arguments: list[str], count: int) -> np.ndarray:
    """What `measure` returns on the first of so many ranks."""
    from pipeline.process import launching

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.npy"
        if code := launching.run([*arguments, f"--rows={path}"], count, module="benchmarks.ranks"):
            sys.exit(f"a rank ended with exit code {code}; see its message above")
        return np.load(path)


def train(options) -> None:
    from pipeline.devices import device
    from pipeline.devices.communication import Collectives
    from pipeline.process.ranks import joined

    device.use("CPU")
    path = Path(tempfile.gettempdir()) / f".ranks-{os.getuid()}-{os.environ['MS_SCHED_PORT']}"
    with joined(path) as ranks:
        collectives = Timed(Collectives(ranks, "CPU"))
        rows = measure(options, ranks, collectives)
        if ranks.is_first and options.rows:
            np.save(options.rows, rows)
        elif ranks.is_first:
            print(line(options, ranks.size, collectives.received_bytes, rows), flush=True)


class Timed:
    """Collectives that note how long this rank has waited for others, and what it has received."""

    def __init__(self, collectives):
        self._inner, self.ranks, self.waiting_seconds, self.received_bytes = collectives, collectives.ranks, 0.0, 0
        meet, collectives.meet = collectives.meet, self.meet
        self._meet = meet

    def meet(self) -> None:
        began = time.perf_counter()
        self._meet()
        self.waiting_seconds += time.perf_counter() - began

    def gathered(self, tensor) -> list:
        self.received_bytes = 4 * tensor.size * (self.ranks.size - 1)
        return self._inner.gathered(tensor)

    def summed(self, tensor):
        self.received_bytes = int(4 * tensor.size * 2 * (self.ranks.size - 1) / self.ranks.size)
        return self._inner.summed(tensor)


def measure(options, ranks, collectives: Timed) -> np.ndarray:
    """Seconds of each step but the first ones: (steps, 3), whole, of waiting, and of the exchange."""
    import mindspore as ms

    from pipeline.devices.precision import Policy
    from pipeline.flux.prediction import prediction
    from pipeline.methods import lora_layers
    from pipeline.settings.fields import Lora, Train
    from pipeline.training import exchange, loop, team
    from pipeline.training.loss import flow_loss

    transformer, policy = random_transformer(options), Policy("fp32", "fp32", "fp32")
    trained = lora_layers.inject(transformer, Lora(rank=options.rank), policy, seed=0)
    settings = Train(mode="jit", learning_rate=LEARNING_RATE, accumulate=ranks.size)
    sums = exchange.sum_of(collectives, options.reduce, trained)
    training = loop.Training(flow_loss(prediction(transformer)), trained, settings, share=team.Share(ranks, sums))
    batch, rows, spent = tuple(ms.Tensor(array) for array in random_batch(options)), [], [0.0]

    def timed(work):
        def call(*args, **named):
            began, waited = time.perf_counter(), collectives.waiting_seconds
            result = work(*args, **named)
            spent[0] += time.perf_counter() - began - (collectives.waiting_seconds - waited)
            return result

        return call

    sums.add, sums.total = timed(sums.add), timed(sums.total)
    for _ in range(options.steps + FIRST):
        began, waited, before = time.perf_counter(), collectives.waiting_seconds, spent[0]
        training.advance([batch]).read()
        rows.append((time.perf_counter() - began, collectives.waiting_seconds - waited, spent[0] - before))
    return np.array(rows)[FIRST:]


def line(options, size: int, received_bytes: int, rows: np.ndarray) -> str:
    step, waiting, spent = np.median(rows, axis=0)
    cells = f"{received_bytes / 1e6:>9.2f} MB{step * 1e3:>7.1f} ms{waiting * 1e3:>7.1f} ms{spent * 1e3:>7.1f} ms"
    return f"{size:>5} {options.reduce:>8}{cells}{100 * spent / step:>6.1f} %"


if __name__ == "__main__":
    if "--start-scheduler" in sys.argv:
        from pipeline.process.launching import start_scheduler

        start_scheduler()
    extra = [each for each in sys.argv[1:] if each != "--start-scheduler"]
    sys.argv[1:] = extra[: extra.index("--parent")] if "--parent" in extra else extra
    sys.exit(main())
