"""Dropout on LoRA layers (arXiv:2106.09685 names none; PEFT's ``lora_dropout``) that a resumed run repeats exactly.

MindSpore's own dropout draws from a state of the device that can neither be saved nor restored.  Here an element is
dropped by a hash of its place, the layer's number and the batch's seed, in the manner of MurmurHash3's finalizer: whole
numbers of 32 bits, which every device computes alike.
"""

import numpy as np

from pipeline import draws

GOLDEN = -1640531527  # 2**32 divided by the golden ratio, as a signed 32-bit number
MULTIPLIERS = (-2048144789, -1028477387)  # of the finalizer, 0x85ebca6b and 0xc2b2ae35
SHIFTS = (16, 13, 16)


class Dropouts:
    """Dropout with probability ``rate`` before all LoRA layers of a model; `reseed` before every batch."""

    def __init__(self, layers: list, adapter: str, rate: float, seed: int):
        import mindspore as ms

        self.run_seed, self.is_used = seed, bool(layers)
        self.seed = ms.Parameter(ms.Tensor(0, ms.int32), name="lora_dropout_seed", requires_grad=False)
        for number, layer in enumerate(layers):
            layer.lora_dropout[adapter] = _make_dropout(rate, number, self.seed)

    def reseed(self, batch: int) -> None:
        """Draw the batch's seed.  batch: counted from 0 over the whole run."""
        import mindspore as ms
        from mindspore import ops

        if not self.is_used:
            return
        drawn = draws.generator(self.run_seed, draws.Purpose.LORA_DROPOUT, batch).integers(-(2**31), 2**31)
        ops.assign(self.seed, ms.Tensor(int(drawn), ms.int32))  # a compiled graph would not see set_data


def _make_dropout(rate: float, number: int, seed):
    """A cell that drops each element of its input with probability ``rate`` and scales the others by 1 / (1 - rate)."""
    import mindspore as ms
    from mindspore import nn, ops

    class SeededDropout(nn.Cell):
        def __init__(self):
            super().__init__()
            self.rate, self.kept_scale, self.seed = rate, 1 / (1 - rate), seed
            self.limit = ms.Tensor(int(rate * 2**31), ms.int32)
            self.offset = ms.Tensor(np.int32(_hash(number)))
            self.constants = [ms.Tensor(value, ms.int32) for value in (0, 1, GOLDEN, 2**31 - 1, *MULTIPLIERS, *SHIFTS)]

        def construct(self, x):
            zero, one, golden, low_bits, first, second, *shifts = self.constants
            places = ops.range(zero, ops.scalar_to_tensor(x.size, ms.int32), one).astype(ms.int32)
            bits = places * golden + self.seed + self.offset
            bits = ops.bitwise_xor(bits, ops.bitwise_right_shift(bits, shifts[0])) * first
            bits = ops.bitwise_xor(bits, ops.bitwise_right_shift(bits, shifts[1])) * second
            bits = ops.bitwise_and(ops.bitwise_xor(bits, ops.bitwise_right_shift(bits, shifts[2])), low_bits)
            kept = (bits >= self.limit).astype(x.dtype) * self.kept_scale
            return x * kept.reshape(x.shape)

    return SeededDropout()


def _hash(number: int) -> int:
    """Spread small numbers over 32 bits, so that the layers' patterns have nothing in common."""
    return int(np.random.Generator(np.random.Philox(key=number)).integers(-(2**31), 2**31))
