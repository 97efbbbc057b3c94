"""Drawn densities against their analytic distributions, and weights against closed forms (arXiv:2403.03206, 3.1)."""

import math

import numpy as np
import pytest

from pipeline import draws
from pipeline.draws import Purpose
from pipeline.training.weighting import (
    DENSITY_SCHEMES,
    MODE_SCALES,
    SCHEMES,
    WEIGHT_SCHEMES,
    densities,
    level_indices,
    loss_weights,
)

NUM_DRAWN = 100_000
SIGMAS = np.linspace(1, 1000, 1000).astype(np.float32) / 1000


def generator(step: int = 0) -> np.random.Generator:
    return draws.generator(3, Purpose.SIGMA, step)


def kolmogorov_distance(values: np.ndarray, cdf) -> float:
    """The greatest distance of the empirical distribution from ``cdf``, on either side of its steps."""
    expected, count = cdf(np.sort(values)), len(values)
    steps = np.arange(count + 1) / count
    return max(np.abs(expected - steps[:-1]).max(), np.abs(expected - steps[1:]).max())


def assert_distributed(values: np.ndarray, cdf) -> None:
    assert kolmogorov_distance(values, cdf) < 1.63 / len(values) ** 0.5  # which chance exceeds in 1 of 100


def uniform(u):
    return u


def logit_normal(mean: float, std: float):
    phi = np.vectorize(lambda z: (1 + math.erf(z / 2**0.5)) / 2)
    return lambda u: phi((np.log(u / (1 - u)) - mean) / std)


def mode(scale: float):
    """P(f(V) <= u) for the paper's decreasing f is P(V >= v) where f(v) = u; f is inverted on a fine grid."""
    v = np.linspace(0, 1, 1_000_001)
    f = 1 - v - scale * ((1 + np.cos(np.pi * v)) / 2 - 1 + v)
    assert (np.diff(f) <= 1e-15).all()
    return lambda u: 1 - np.interp(u, f[::-1], v[::-1])


@pytest.mark.parametrize("scheme", ["none", *WEIGHT_SCHEMES])
def test_schemes_that_weigh_draw_uniformly(scheme):
    assert_distributed(densities(scheme, generator(), NUM_DRAWN), uniform)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.0, 0.6), (-0.5, 2.0)])
def test_logit_normal_draws_have_the_analytic_distribution(mean, std):
    u = densities("logit_normal", generator(), NUM_DRAWN, logit_mean=mean, logit_std=std)
    assert_distributed(u, logit_normal(mean, std))
    assert kolmogorov_distance(u, logit_normal(mean + 0.1, std)) > 0.01  # the test can tell


@pytest.mark.parametrize("scale", [1.29, 0.0, 0.81, *MODE_SCALES])
def test_mode_draws_have_the_analytic_distribution(scale):
    u = densities("mode", generator(), NUM_DRAWN, mode_scale=scale)
    assert_distributed(u, mode(scale))
    assert kolmogorov_distance(u, mode(scale + 0.1 if scale < 1.6 else scale - 0.1)) > 0.005


def test_diffusers_defaults_are_ours():
    for scheme, settings in [("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}), ("mode", {"mode_scale": 1.29})]:
        expected = densities(scheme, generator(), 100, **settings)
        np.testing.assert_array_equal(densities(scheme, generator(), 100), expected)


def test_a_logit_mean_above_zero_prefers_the_schedules_last_levels():
    means = [densities("logit_normal", generator(), 1000, logit_mean=mean).mean() for mean in (-1.0, 0.0, 1.0)]
    assert means[0] < 0.4 < means[1] < 0.6 < means[2]


def test_without_a_scheme_every_step_draws_what_it_drew_before_there_were_schemes():
    for step in range(200):
        ours, theirs = generator(step), generator(step)
        levels = level_indices(densities("none", ours, 500), 1000)
        np.testing.assert_array_equal(levels, (theirs.random(500) * 1000).astype(np.int64))
        assert ours.random() == theirs.random()  # and leaves the generator where it was left


def test_the_levels_of_the_release_before_schemes():
    """Printed once by that release's own expression with NumPy 1.26 on x86-64."""
    assert level_indices(densities("none", generator(9), 6), 1000).tolist() == [722, 910, 668, 121, 667, 400]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extreme_draws_still_name_a_level(scheme):
    """Draws whose uniform part is 0 or next to 1, and whose normal part is far beyond any that occurs."""

    class Extreme:
        random = standard_normal = staticmethod(lambda size: np.array([0.0, 1e-17, 1 - 2**-53, 50.0, -800.0])[:size])

    u = densities(scheme, Extreme(), 5 if scheme == "logit_normal" else 3)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    assert set(level_indices(u, 1000)) <= set(range(1000))


def test_level_indices_are_even_and_clipped_to_the_last():
    assert level_indices(np.array([0.0, 0.24999, 0.25, 0.99999, 1.0]), 4).tolist() == [0, 0, 1, 3, 3]


@pytest.mark.parametrize("scale", [-1.1, 1.76, float("nan")])
def test_a_mode_scale_that_leaves_the_schedule_is_refused(scale):
    with pytest.raises(ValueError, match=r"from -1.0 to 1.7519, found"):
        densities("mode", generator(), 4, mode_scale=scale)


@pytest.mark.parametrize("scheme", ["none", *DENSITY_SCHEMES])
def test_schemes_that_draw_weigh_equally(scheme):
    weights = loss_weights(scheme, SIGMAS)
    assert weights.dtype == np.float32 and weights.tolist() == [1.0] * len(SIGMAS)


def test_sigma_sqrt_weighs_by_one_over_sigma_squared():
    weights = loss_weights("sigma_sqrt", SIGMAS)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, 1e6 / np.arange(1, 1001) ** 2, rtol=1e-6)
    assert (np.diff(weights) < 0).all()


def test_sigma_sqrt_stays_finite_at_the_tiniest_levels():
    weights = loss_weights("sigma_sqrt", np.array([0.0, 1e-45, 1e-20, 1e-6, 2e-6], np.float32))
    np.testing.assert_allclose(weights, [1e12, 1e12, 1e12, 1e12, 0.25e12], rtol=1e-6)


def test_cosmap_is_a_density_over_the_levels_with_its_peak_in_the_middle():
    sigmas = np.linspace(0, 1, 100_001)
    weights = loss_weights("cosmap", sigmas)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[[0, 50_000, 100_000]], [2 / np.pi, 4 / np.pi, 2 / np.pi], rtol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-6)
    # The paper's origin of it: the density of t = 1 - 1 / (1 + tan(pi u / 2)), u uniform.
    t = 1 - 1 / (1 + np.tan(np.pi / 2 * generator().random(NUM_DRAWN)))
    cumulated = np.cumsum(weights.astype(np.float64)) / 100_000
    assert cumulated[-1] == pytest.approx(1, abs=1e-4)
    assert_distributed(t, lambda values: np.interp(values, sigmas, cumulated))


def test_every_scheme_acts_through_one_thing_at_most():
    acts = {s: (not np.array_equal(densities(s, generator(), 99), generator().random(99)),
                (loss_weights(s, SIGMAS) != 1).any()) for s in SCHEMES}  # fmt: skip
    assert acts == {s: (s in DENSITY_SCHEMES, s in WEIGHT_SCHEMES) for s in SCHEMES}


def test_an_unknown_scheme_is_refused():
    for refused in (lambda: densities("sigma", generator(), 1), lambda: loss_weights("sigma", SIGMAS)):
        with pytest.raises(ValueError, match="'sigma': must be one of none, logit_normal, mode, sigma_sqrt, cosmap"):
            refused()
