"""LoRA dropout: the share that is asked for; a pattern for each batch and layer, the same again for the same batch."""

from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("cpu")
RATE = 0.3


def make(num_layers=2, seed=0):
    from pipeline.methods.lora_dropout import Dropouts

    layers = [SimpleNamespace(lora_dropout={}) for _ in range(num_layers)]
    dropouts = Dropouts(layers, "default", RATE, seed)
    return dropouts, [layer.lora_dropout["default"] for layer in layers]


def ones(shape=(3, 50, 64)):
    import mindspore as ms

    return ms.Tensor(np.ones(shape, np.float32))


def pattern(cell, shape=(3, 50, 64)):
    return cell(ones(shape)).asnumpy() != 0


def test_a_share_is_dropped_and_the_rest_scaled_so_that_the_mean_stays():
    dropouts, (cell, _) = make()
    shares = []
    for batch in range(50):
        dropouts.reseed(batch)
        found = cell(ones()).asnumpy()
        assert set(np.unique(found)) <= {np.float32(0), np.float32(1 / 0.7)}
        shares.append((found == 0).mean())
    deviation = np.sqrt(RATE * (1 - RATE) / (50 * 9600))
    assert np.mean(shares) == pytest.approx(RATE, abs=5 * deviation)
    assert np.std(shares) < 3 * np.sqrt(RATE * (1 - RATE) / 9600)


def test_patterns_of_batches_layers_and_seeds_have_nothing_in_common():
    patterns = []
    for seed in (0, 1):
        dropouts, cells = make(seed=seed)
        for batch in (0, 1):
            dropouts.reseed(batch)
            patterns += [pattern(cell).ravel() for cell in cells]
    correlations = np.corrcoef(np.array(patterns, float)) - np.eye(len(patterns))
    assert abs(correlations).max() < 5 / np.sqrt(9600)


@pytest.mark.parametrize("lag", [1, 2, 64, 3200])
def test_neighbours_in_a_pattern_have_nothing_in_common(lag):
    dropouts, (cell, _) = make()
    dropouts.reseed(5)
    found = pattern(cell, (3, 500, 64)).ravel().astype(float)
    assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 5 / np.sqrt(len(found))


def test_the_same_batch_has_the_same_pattern_compiled_or_not():
    import mindspore as ms

    dropouts, (cell, _) = make()
    compiled = ms.jit(lambda_free(cell))
    for batch in (3, 4, 3):
        dropouts.reseed(batch)
        assert (compiled(ones()).asnumpy() == cell(ones()).asnumpy()).all()
    dropouts.reseed(3)
    first = pattern(cell)
    dropouts.reseed(4)
    assert (pattern(cell) != first).any()


def lambda_free(cell):
    """The graph compiler parses no lambdas."""

    def apply(x):
        return cell(x)

    return apply


@pytest.mark.parametrize("shape", [(7,), (3, 50, 64), (2, 1100, 1024)], ids=str)
def test_the_pattern_is_the_hash_of_seed_layer_and_place(shape):
    from pipeline.methods.lora_dropout import kept

    dropouts, cells = make()
    dropouts.reseed(11)
    for number, cell in enumerate(cells):
        expected = kept(int(np.prod(shape)), RATE, number, int(dropouts.seed.asnumpy()))
        assert (pattern(cell, shape).ravel() == expected).all()


def test_a_device_that_computes_another_pattern_is_refused(monkeypatch):
    from mindspore import ops

    from pipeline.errors import UserError

    monkeypatch.setattr(ops, "bitwise_xor", ops.bitwise_or)
    with pytest.raises(UserError, match="lora.dropout: this device computes whole numbers of 32 bits differently"):
        make()


def test_the_gradient_is_the_pattern():
    import mindspore as ms

    dropouts, (cell, _) = make()
    dropouts.reseed(0)

    def total(x):
        return cell(x).sum()

    gradient = ms.grad(total)(ones()).asnumpy()
    assert (gradient == cell(ones()).asnumpy()).all()


def test_half_precision_stays_half():
    import mindspore as ms

    dropouts, (cell, _) = make()
    assert cell(ones().astype(ms.float16)).dtype == ms.float16
