import numpy as np
import pytest

from pipeline.flux import flow

SHAPES = [(1, 1, 2, 2), (2, 3, 4, 6), (3, 16, 8, 2), (1, 16, 12, 10)]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_undone_by_unpacking(shape):
    latents = random(*shape)
    np.testing.assert_array_equal(flow.unpack(flow.pack(latents), *shape[2:]), latents)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_is_a_patch_of_two_by_two_channel_by_channel(shape):
    """As in diffusers' ``FluxPipeline._pack_latents``, written as loops."""
    latents, tokens = random(*shape), flow.pack(random(*shape))
    batch, channels, height, width = shape
    assert tokens.shape == (batch, height * width // 4, 4 * channels)
    for b in range(batch):
        for row in range(height // 2):
            for column in range(width // 2):
                patch = [
                    latents[b, c, 2 * row + y, 2 * column + x] for c in range(channels) for y in (0, 1) for x in (0, 1)
                ]
                assert tokens[b, row * (width // 2) + column].tolist() == patch


@pytest.mark.parametrize("shape", [(1, 4, 3, 4), (1, 4, 4, 5)])
def test_latents_of_an_odd_size_cannot_be_packed(shape):
    with pytest.raises(ValueError):
        flow.pack(random(*shape))


def test_tokens_of_another_size_cannot_be_unpacked():
    with pytest.raises(ValueError):
        flow.unpack(flow.pack(random(1, 4, 4, 6)), 4, 4)


@pytest.mark.parametrize("height, width", [(2, 2), (4, 6), (10, 2)])
def test_image_ids_are_the_row_and_column_of_each_token(height, width):
    ids = flow.image_ids(height, width)
    assert ids.dtype == np.float32
    assert ids.tolist() == [[0, row, column] for row in range(height // 2) for column in range(width // 2)]


def test_image_ids_are_in_the_order_of_the_tokens():
    height, width = 6, 10
    rows, columns = np.meshgrid(np.arange(height) // 2, np.arange(width) // 2, indexing="ij")
    tokens = flow.pack(np.stack([rows, columns])[None].astype(np.float32))[0]
    np.testing.assert_array_equal(tokens[:, [0, 4]], flow.image_ids(height, width)[:, 1:])


def test_sigma_0_is_the_latents_and_sigma_1_is_the_noise():
    latents, noise = random(2, 5, 4), random(2, 5, 4, seed=1)
    x = flow.noised(latents, noise, np.array([0, 1], np.float32))
    np.testing.assert_array_equal(x[0], latents[0])
    np.testing.assert_array_equal(x[1], noise[1])
    assert x.dtype == np.float32


def test_the_velocity_of_the_path_is_noise_minus_latents():
    latents, noise = random(3, 5, 4).astype(np.float64), random(3, 5, 4, seed=1).astype(np.float64)
    sigma = np.array([0.1, 0.5, 0.8])
    velocity = (flow.noised(latents, noise, sigma + 1e-3) - flow.noised(latents, noise, sigma - 1e-3)) / 2e-3
    np.testing.assert_allclose(velocity, noise - latents, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "latents, noise, sigma",
    [
        ((2, 5, 4), (2, 5, 3), (2,)),
        ((2, 5, 4), (1, 5, 4), (2,)),
        ((2, 5, 4), (2, 5, 4), (1,)),
        ((2, 5, 4), (2, 5, 4), (2, 1)),
    ],
)
def test_shapes_that_differ_are_an_error_that_shows_them(latents, noise, sigma):
    with pytest.raises(ValueError) as error:
        flow.noised(random(*latents), random(*noise), random(*sigma))
    for shape in (latents, noise, sigma):
        assert str(shape) in str(error.value)


def posterior(mean, log_variance, shape):
    channels = [np.full(shape, value, np.float32) for value in (mean, log_variance)]
    return np.concatenate(channels, axis=1)


def test_a_posterior_sample_has_the_posteriors_mean_and_deviation():
    shape = (4, 8, 40, 40)
    sample = flow.sample_posterior(posterior(2, np.log(9), shape), random(*shape)).astype(np.float64)
    assert sample.shape == shape
    assert abs(sample.mean() - 2) < 5 * 3 / sample.size**0.5
    assert abs(sample.std() - 3) < 5 * 3 / (2 * sample.size) ** 0.5


def test_the_first_half_of_the_channels_are_means_the_second_log_variances():
    moments = random(2, 6, 3, 5)
    noise = random(2, 3, 3, 5, seed=1)
    expected = moments[:, :3] + np.sqrt(np.exp(moments[:, 3:])) * noise
    np.testing.assert_allclose(flow.sample_posterior(moments, noise), expected, rtol=1e-5, atol=1e-6)


def test_without_noise_the_sample_is_the_mode():
    moments = random(2, 6, 3, 5)
    np.testing.assert_array_equal(flow.sample_posterior(moments, None), moments[:, :3])


@pytest.mark.parametrize(
    "log_variance, deviation", [(-1e4, np.exp(-15)), (-31, np.exp(-15)), (21, np.exp(10)), (1e4, np.exp(10))]
)
def test_log_variances_are_kept_in_the_limits_of_the_vae(log_variance, deviation):
    """As in diffusers' ``DiagonalGaussianDistribution``: between -30 and 20."""
    shape = (1, 2, 3, 3)
    sample = flow.sample_posterior(posterior(0, log_variance, shape), np.ones(shape, np.float32))
    np.testing.assert_allclose(sample, deviation, rtol=1e-5)


def test_a_half_precision_posterior_is_sampled_in_float32():
    moments, noise = random(1, 4, 2, 2).astype(np.float16), random(1, 2, 2, 2, seed=1)
    sample = flow.sample_posterior(moments, noise)
    assert sample.dtype == np.float32
    np.testing.assert_array_equal(sample, flow.sample_posterior(moments.astype(np.float32), noise))


def test_normalizing_shifts_then_scales():
    latents = random(1, 2, 3, 4)
    found = flow.normalized(latents, 0.1159, 0.3611)
    np.testing.assert_allclose(found, (latents.astype(np.float64) - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32
