"""Dropout on LoRA layers (arXiv:2106.09685 names none; PEFT's ``lora_dropout``) that a resumed run repeats exactly.

MindSpore's own dropout draws from a state of the device that can neither be saved nor restored.  Here an element is
dropped by a hash of its place, the layer's number and the batch's seed, in the manner of MurmurHash3's finalizer: whole
numbers of 32 bits that wrap around.  A device that computes them otherwise is refused.
"""

import numpy as np

from pipeline import draws
from pipeline.errors import UserError

GOLDEN = -1640531527  # 2**32 divided by the golden ratio, as a signed 32-bit number
MULTIPLIERS = (-2048144789, -1028477387)  # of the finalizer, 0x85ebca6b and 0xc2b2ae35
SHIFTS = (16, 13, 16)


class Dropouts:
    """Dropout with probability ``rate`` before all LoRA layers of a model; `reseed` before every batch.

    Raises UserError where the device does not compute the pattern that NumPy does.
    """

    def __init__(self, layers: list, adapter: str, rate: float, seed: int):
        import mindspore as ms

        self.run_seed, self.is_used = seed, bool(layers)
        self.seed = ms.Parameter(ms.Tensor(0, ms.int32), name="lora_dropout_seed", requires_grad=False)
        for number, layer in enumerate(layers):
            layer.lora_dropout[adapter] = _make_dropout(rate, number, self.seed)
        if layers:
            _check(layers[0].lora_dropout[adapter], rate)

    def reseed(self, batch: int) -> None:
        """Draw the batch's seed.  batch: counted from 0 over the whole run."""
        import mindspore as ms
        from mindspore import ops

        if not self.is_used:
            return
        drawn = draws.generator(self.run_seed, draws.Purpose.LORA_DROPOUT, batch).integers(-(2**31), 2**31)
        ops.assign(self.seed, ms.Tensor(int(drawn), ms.int32))  # a compiled graph would not see set_data


def _check(dropout, rate: float) -> None:
    import mindspore as ms

    found = dropout(ms.Tensor(np.ones((32, 32), np.float32))).asnumpy().ravel() != 0
    if (found != kept(1024, rate, number=0, seed=0)).any():
        raise UserError(
            "lora.dropout: this device computes whole numbers of 32 bits differently: set it to 0, and report it"
        )


def kept(size: int, rate: float, number: int, seed: int) -> np.ndarray:
    """Which of ``size`` elements layer ``number`` keeps, computed by NumPy.  seed: the batch's."""
    with np.errstate(over="ignore"):
        bits = np.arange(size, dtype=np.int32) * np.int32(GOLDEN) + np.int32(seed) + np.int32(_hash(number))
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1)):
            bits = (bits ^ (bits >> shift)) * np.int32(multiplier)
    return (bits & (2**31 - 1)) >= int(rate * 2**31)


def _make_dropout(rate: float, number: int, seed):
    """A cell that drops each element of its input with probability ``rate`` and scales the others by 1 / (1 - rate)."""
    import mindspore as ms
    from mindspore import mint, nn, ops

    def shifted(bits, high, factor):
        """``bits >> n``, where ``high`` is -2**n and ``factor`` is 2**-n.

        The bits above the n lowest are at most 19, so that float32 holds them exactly.  Ascend shifts whole numbers on
        its AI CPU, of which it has few.
        """
        return (ops.bitwise_and(bits, high).astype(ms.float32) * factor).astype(ms.int32)

    class SeededDropout(nn.Cell):
        def __init__(self):
            super().__init__()
            self.rate, self.kept_scale, self.seed = rate, 1 / (1 - rate), seed
            self.limit = ms.Tensor(int(rate * 2**31), ms.int32)
            self.offset = ms.Tensor(np.int32(_hash(number)))
            self.constants = [ms.Tensor(value, ms.int32) for value in (GOLDEN, 2**31 - 1, *MULTIPLIERS)]
            self.highs = [ms.Tensor(-(2**shift), ms.int32) for shift in SHIFTS]
            self.factors = [2.0**-shift for shift in SHIFTS]

        def construct(self, x):
            golden, low_bits, first, second = self.constants
            highs, factors = self.highs, self.factors
            width = x.shape[-1]  # place = row * width + column: no list of places is longer than a row or a column
            rows = mint.arange(0, x.size // width, 1, dtype=ms.int32).reshape(-1, 1)
            places = (rows * width + mint.arange(0, width, 1, dtype=ms.int32).reshape(1, -1)).reshape(x.shape)
            bits = places * golden + self.seed + self.offset
            bits = ops.bitwise_xor(bits, shifted(bits, highs[0], factors[0])) * first
            bits = ops.bitwise_xor(bits, shifted(bits, highs[1], factors[1])) * second
            bits = ops.bitwise_and(ops.bitwise_xor(bits, shifted(bits, highs[2], factors[2])), low_bits)
            return x * ((bits >= self.limit).astype(x.dtype) * self.kept_scale)

    return SeededDropout()


def _hash(number: int) -> int:
    """Spread small numbers over 32 bits, so that the layers' patterns have nothing in common."""
    return int(np.random.Generator(np.random.Philox(key=number)).integers(-(2**31), 2**31))
