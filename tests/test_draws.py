import numpy as np
import pytest

from pipeline import draws
from pipeline.draws import Purpose


@pytest.mark.parametrize("purpose", Purpose)
def test_the_same_place_draws_the_same_numbers(purpose):
    first, again = (draws.normal(5, purpose, 17, (3, 4)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32 and first.shape == (3, 4)


def test_streams_differ_by_seed_by_purpose_and_by_index():
    places = [(seed, purpose, index) for seed in (0, 1, 2**63 - 1) for purpose in Purpose for index in (0, 1, 2, 2**40)]
    values = np.concatenate([draws.normal(*place, (100,)) for place in places])
    assert len(np.unique(values)) > len(values) - 5  # a few of 7,200 float32 numbers coincide by chance


def test_neighbouring_indices_are_no_shifts_of_each_other():
    streams = [draws.generator(0, Purpose.NOISE, index).integers(0, 2**63, 2000) for index in range(4)]
    assert len(np.unique(np.concatenate(streams))) == 8000


def test_drawing_leaves_the_global_generator_alone():
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    draws.normal(0, Purpose.NOISE, 0, (10,))
    draws.generator(0, Purpose.ORDER, 3).permutation(5)
    assert np.random.random() == expected


def test_normal_numbers_are_standard_normal():
    values = draws.normal(1, Purpose.NOISE, 3, (200_000,)).astype(np.float64)
    assert abs(values.mean()) < 5 / 200_000**0.5
    assert abs(values.var() - 1) < 5 * (2 / 200_000) ** 0.5


def test_the_streams_are_those_of_every_earlier_release():
    """Printed once by this code with NumPy 1.26 on x86-64: a run that is resumed later must draw the same."""
    assert draws.normal(0, Purpose.NOISE, 0, (4,)).tolist() == [
        -1.4314630031585693, 1.6707168817520142, -0.4027239680290222, -1.2956420183181763
    ]  # fmt: skip
    assert draws.normal(7, Purpose.POSTERIOR, 12345, (3,)).tolist() == [
        -0.832428514957428, 1.6378605365753174, 0.6458426117897034
    ]  # fmt: skip
    assert draws.generator(3, Purpose.SIGMA, 9).integers(0, 1000, 6).tolist() == [281, 722, 185, 910, 137, 668]
    assert draws.generator(2**63 - 1, Purpose.LORA_INIT, 1).random(2).tolist() == [
        0.2336265287667203, 0.9109210078458577
    ]  # fmt: skip
    assert [draws.generator(0, Purpose.ORDER, epoch).permutation(10).tolist() for epoch in range(2)] == [
        [0, 7, 8, 6, 9, 5, 1, 3, 2, 4], [3, 2, 9, 7, 1, 5, 0, 4, 8, 6]
    ]  # fmt: skip


def test_purposes_keep_their_numbers():
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "ORDER": 0, "NOISE": 1, "SIGMA": 2, "POSTERIOR": 3, "LORA_INIT": 4, "EVALUATION": 5,
        "LORA_DROPOUT": 6, "FLIP": 7, "CROP": 8, "CAPTION_DROPOUT": 9,
        "CONTROL_POSTERIOR": 10, "SAMPLE": 11, "PRIOR_ORDER": 12, "PRIOR_SIGMA": 13, "PRIOR_NOISE": 14,
    }  # fmt: skip
