import math

import numpy as np
import pytest

from pipeline.study import distances

RANDOM = np.random.default_rng(0).standard_normal((5, 7))


@pytest.mark.parametrize(
    ("found", "reference", "error", "cosine"),
    [
        ([3.0, 4.5], [3.0, 4.0], 0.1, 27 / (5 * math.hypot(3, 4.5))),
        (1.25 * RANDOM, RANDOM, 0.25, 1.0),
        (-RANDOM, RANDOM, 2.0, -1.0),
        ([0.0, 2.0], [1.0, 0.0], math.sqrt(5), 0.0),
        (RANDOM, RANDOM, 0.0, 1.0),
    ],
)
def test_error_and_cosine_are_those_of_the_formulas(found, reference, error, cosine):
    found, reference = np.asarray(found), np.asarray(reference)
    assert distances.relative_error(found, reference) == pytest.approx(error, abs=1e-12)
    assert distances.cosine(found, reference) == pytest.approx(cosine, abs=1e-12)


def test_sums_of_half_floats_do_not_overflow():
    large = np.full(1000, 60000, np.float16)
    assert distances.relative_error(large, large / 2) == 1.0
    assert distances.cosine(large, large / 2) == pytest.approx(1.0, abs=1e-12)


def test_what_is_not_finite_has_no_error_and_zeros_have_no_angle():
    one, broken, zeros = np.ones(3), np.array([1, np.inf, 1]), np.zeros(3)
    for pair in ((one, broken), (broken, one)):
        assert math.isnan(distances.relative_error(*pair)) and math.isnan(distances.cosine(*pair))
        assert math.isnan(distances.psnr(*pair))
    assert distances.relative_error(zeros, zeros) == 0 and math.isnan(distances.relative_error(one, zeros))
    assert math.isnan(distances.cosine(zeros, one))


def test_psnr_of_pixels_that_are_off_by_one_is_48_db():
    image = np.full((3, 4, 5), 100, np.float32)
    assert distances.psnr(image + 1, image) == pytest.approx(20 * math.log10(255))
    assert distances.psnr(image, image) == math.inf


def test_values_that_are_not_finite_are_counted_by_item():
    arrays = {"a": np.ones(3), "b": np.array([np.nan, 1, -np.inf]), "c": np.array([np.inf])}
    assert distances.not_finite(arrays) == {"b": 2, "c": 1}


def test_the_worst_item_is_named_and_what_is_not_finite_is_left_out():
    errors = {"a": 0.1, "b": math.nan, "c": 0.3}
    rows = [{"item": item, "relative_error": error} for item, error in errors.items()]
    assert distances.summary(rows, "relative_error", max) == {"mean": 0.2, "worst": 0.3, "worst_item": "c"}
    assert distances.summary(rows, "relative_error", min)["worst_item"] == "a"
    assert set(distances.summary(rows[1:2], "relative_error", max).values()) == {None}


def test_a_loss_that_rises_is_a_change_above_zero_with_the_error_of_the_pairs():
    against = np.array([1.0, 5.0, 3.0], np.float32)
    found = distances.change(against + np.float32([0.25, 0.5, 0.75]), against)
    assert found == {
        "pairs": 3,
        "own": 3.5,
        "against": 3.0,
        "change": 0.5,
        "standard_error": pytest.approx(0.25 / math.sqrt(3)),
    }
    assert distances.change(against - 1, against)["change"] == -1


def test_a_single_pair_has_no_standard_error_and_broken_losses_have_no_change():
    assert distances.change(np.ones(1), np.ones(1))["standard_error"] is None
    assert distances.change(np.array([1, np.nan]), np.ones(2)) is None
    assert distances.change(np.ones(0), np.ones(0)) is None
