"""FLUX.1's models on CPU, with random weights: both modes agree, batches do not mix, gradients are gradients."""

import numpy as np
import pytest

SIZES = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4}
SIZES |= {"joint_attention_dim": 96, "pooled_projection_dim": 64, "axes_dims_rope": (4, 14, 14)}
SIDE, NUM_TEXT = 4, 5


def set_random_weights(model, dtype):
    """Norm scales near 1, biases near 0, and matrices that keep a signal's size; every parameter has an effect."""
    import mindspore as ms

    generator = np.random.default_rng(0)
    for name, parameter in sorted(model.parameters_dict().items()):
        value = generator.standard_normal(parameter.shape)
        if len(parameter.shape) > 1:
            value /= np.sqrt(np.prod(parameter.shape[1:]))
        else:
            value = 0.1 * value + name.endswith(("weight", "gamma"))
        parameter.set_dtype(dtype)
        parameter.set_data(ms.Tensor(value, dtype))
        parameter.requires_grad = False
    return model.set_train(False)


def add_lora(transformer, compute):
    """LoRA as mindone's FLUX.1 script sets it up: fp32 parameters, arithmetic in ``compute``; B is not zero here."""
    import mindspore as ms
    from mindone.peft import LoraConfig
    from mindone.peft.tuners.tuners_utils import BaseTunerLayer

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    generator = np.random.default_rng(1)
    for _, layer in transformer.cells_and_names():
        if isinstance(layer, BaseTunerLayer):
            for part in (layer.lora_A["default"], layer.lora_B["default"]):
                part.weight.set_data(ms.Tensor(0.1 * generator.standard_normal(part.weight.shape), ms.float32))
                if compute != ms.float32:
                    part.to_float(compute)
    return transformer


def transformer_inputs(dtype, guidance_embeds=True):
    """Positional arguments of the transformer up to ``guidance``; both elements of the batch differ in each."""
    import mindspore as ms

    generator = np.random.default_rng(2)
    latents, txt, pooled = (generator.standard_normal((2, *shape)) for shape in ((SIDE**2, 64), (NUM_TEXT, 96), (64,)))
    img_ids = np.stack([np.zeros(SIDE**2), *np.divmod(np.arange(SIDE**2), SIDE)], 1)
    tensors = [ms.Tensor(array, dtype) for array in (latents, txt, pooled, np.array([0.3, 0.9]))]
    ids = [ms.Tensor(array, dtype) for array in (img_ids, np.zeros((NUM_TEXT, 3)))]
    return [*tensors, *ids, ms.Tensor([3.5, 1.0], ms.float32) if guidance_embeds else None]


def element(inputs, i):
    """One element of the batch, as a batch of one."""
    shared = (4, 5)  # img_ids and txt_ids
    return [x if n in shared or x is None else x[i : i + 1] for n, x in enumerate(inputs)]


def new_transformer(dtype, guidance_embeds=True):
    from mindone.diffusers import FluxTransformer2DModel

    return set_random_weights(FluxTransformer2DModel(**SIZES, guidance_embeds=guidance_embeds), dtype)


def forward_of(transformer):
    def forward(latents, txt, pooled, timestep, img_ids, txt_ids, guidance):
        return transformer(latents, txt, pooled, timestep, img_ids, txt_ids, guidance, return_dict=False)[0]

    return forward


def loss_of(transformer):
    import mindspore as ms

    target = ms.Tensor(np.random.default_rng(4).standard_normal((2, SIDE**2, 64)), ms.float32)
    forward = forward_of(transformer)

    def loss(latents, txt, pooled, timestep, img_ids, txt_ids, guidance):
        output = forward(latents, txt, pooled, timestep, img_ids, txt_ids, guidance)
        return ((output.astype(ms.float32) - target) ** 2).mean()

    return loss


def relative(actual, wanted):
    """Largest difference, in units of the largest value."""
    return np.abs(actual.astype(np.float64) - wanted).max() / np.abs(wanted).max()


DTYPES = {"float32": 2e-6, "float16": 1.5e-2}
"""How near gradients come in both modes, about three times what was measured: both round, to 24 and to 11 bits, some
hundred times in a row, and not in the same order."""


@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "schnell"])
def test_transformer_computes_the_same_in_both_modes_and_every_element_of_a_batch_alone(cpu, guidance_embeds):
    import mindspore as ms

    forward = forward_of(new_transformer(ms.float32, guidance_embeds))
    inputs = transformer_inputs(ms.float32, guidance_embeds)
    batched, compiled = forward(*inputs).asnumpy(), ms.jit(forward)(*inputs).asnumpy()
    assert batched.shape == (2, SIDE**2, 64) and np.abs(batched[0] - batched[1]).max() > 0.1
    assert relative(compiled, batched) < 2e-6
    for i in range(2):
        assert relative(forward(*element(inputs, i)).asnumpy()[0], batched[i]) < 2e-6


@pytest.mark.parametrize("name, index", [("pooled", 2), ("timestep", 3), ("img_ids", 4), ("guidance", 6), ("txt", 1)])
def test_transformer_depends_on_its_every_input(cpu, name, index):
    import mindspore as ms

    forward, inputs = forward_of(new_transformer(ms.float32)), transformer_inputs(ms.float32)
    changed = list(inputs)
    changed[index] = inputs[index] * 0.5
    assert relative(forward(*changed).asnumpy(), forward(*inputs).asnumpy()) > 1e-3


def gradients(dtype_name):
    """Loss and LoRA gradients in both modes, with the transformer and its inputs."""
    import mindspore as ms

    dtype = getattr(ms, dtype_name)
    transformer, inputs = add_lora(new_transformer(dtype), dtype), transformer_inputs(dtype)
    trained = transformer.trainable_params()
    loss = loss_of(transformer)
    differentiate = ms.value_and_grad(loss, None, trained)
    return transformer, loss, inputs, trained, differentiate(*inputs), ms.jit(differentiate)(*inputs)


@pytest.fixture(scope="module")
def fp32_gradients(cpu):
    return gradients("float32")


@pytest.fixture(scope="module")
def fp16_gradients(cpu):
    return gradients("float16")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_lora_gradient_is_the_same_in_both_modes(request, dtype):
    import mindspore as ms

    *_, trained, (loss, eager), (compiled_loss, compiled) = request.getfixturevalue(f"fp{dtype[5:]}_gradients")
    assert len(trained) == len(eager) == len(compiled) == 2 * (2 * 4 + 2 * 3)
    assert abs(float(loss) - float(compiled_loss)) < DTYPES[dtype] * float(loss)
    for parameter, a, b in zip(trained, eager, compiled):
        assert parameter.dtype == a.dtype == b.dtype == ms.float32
        assert np.abs(a.asnumpy()).max() > 0
        assert relative(b.asnumpy(), a.asnumpy()) < DTYPES[dtype], parameter.name


def test_lora_gradient_in_half_precision_is_that_of_fp32(fp32_gradients, fp16_gradients):
    for parameter, wide, narrow in zip(fp32_gradients[3], fp32_gradients[4][1], fp16_gradients[4][1]):
        assert relative(narrow.asnumpy(), wide.asnumpy()) < 2e-2, parameter.name


def test_lora_gradient_is_the_slope_of_the_loss(fp32_gradients):
    """Along each parameter's own gradient, which sums the coordinates and so stands out of fp32's rounding."""
    import mindspore as ms

    _, loss, inputs, trained, (_, eager), _ = fp32_gradients
    for parameter, gradient in list(zip(trained, eager))[::5]:
        at, slope = parameter.asnumpy().copy(), gradient.asnumpy().astype(np.float64)
        length = np.linalg.norm(slope)
        step = 0.03
        values = []
        for sign in (1, -1):
            parameter.set_data(ms.Tensor((at + sign * step * slope / length).astype(np.float32)))
            values.append(float(loss(*inputs)))
        parameter.set_data(ms.Tensor(at))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(length, rel=1e-2), parameter.name


def test_only_lora_weights_are_trainable(fp32_gradients):
    transformer, _, _, trained, *_ = fp32_gradients
    assert {name for name, p in transformer.parameters_and_names() if p.requires_grad} == {p.name for p in trained}
    assert all("lora_" in parameter.name for parameter in trained)


# --- encoders -----------------------------------------------------------------------------------------------------


def clip_pooled(dtype):
    import mindspore as ms
    from mindone.transformers import CLIPTextModel
    from transformers import CLIPTextConfig

    options = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "max_position_embeddings": 9, "eos_token_id": 49, "bos_token_id": 48}
    model = set_random_weights(CLIPTextModel(CLIPTextConfig(**options, pad_token_id=49)), dtype)
    ids = np.random.default_rng(5).integers(0, 48, (2, 9))
    ids[0, 4:], ids[1, 8] = 49, 49
    return lambda tokens: model(tokens, return_dict=False)[1], ms.Tensor(ids, ms.int32), (2, 32)


def t5_sequence(dtype):
    import mindspore as ms
    from mindone.transformers import T5EncoderModel
    from transformers import T5Config

    options = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = set_random_weights(T5EncoderModel(T5Config(**options, feed_forward_proj="gated-gelu")), dtype)
    ids = np.random.default_rng(6).integers(0, 50, (2, 20))
    return lambda tokens: model(tokens, return_dict=False)[0], ms.Tensor(ids, ms.int32), (2, 20, 32)


def new_vae(dtype):
    from mindone.diffusers import AutoencoderKL

    options = {"block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    options |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return set_random_weights(AutoencoderKL(**options, use_quant_conv=False, use_post_quant_conv=False), dtype)


def vae_moments(dtype):
    import mindspore as ms

    vae = new_vae(dtype)
    images = np.random.default_rng(7).uniform(-1, 1, (2, 3, 16, 16))
    return lambda x: vae.encode(x, return_dict=False)[0], ms.Tensor(images, dtype), (2, 8, 8, 8)


def vae_image(dtype):
    import mindspore as ms

    vae = new_vae(dtype)
    latents = np.random.default_rng(8).standard_normal((2, 4, 8, 8))
    return lambda x: vae.decode(x, return_dict=False)[0], ms.Tensor(latents, dtype), (2, 3, 16, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoder", [clip_pooled, t5_sequence, vae_moments, vae_image])
def test_every_element_of_a_batch_is_encoded_as_it_is_alone(cpu, encoder, dtype):
    import mindspore as ms

    forward, inputs, shape = encoder(getattr(ms, dtype))
    batched = forward(inputs)
    assert batched.shape == shape and str(batched.dtype).lower() == dtype
    batched = batched.asnumpy()
    assert np.isfinite(batched).all() and relative(batched[0], batched[1]) > 0.1
    for i in range(2):
        assert relative(forward(inputs[i : i + 1]).asnumpy()[0], batched[i]) < {"float32": 2e-6, "float16": 3e-3}[dtype]


@pytest.mark.parametrize("encoder", [clip_pooled, t5_sequence, vae_moments, vae_image])
def test_half_precision_encodes_as_fp32_does(cpu, encoder):
    import mindspore as ms

    (wide, wide_inputs, _), (narrow, narrow_inputs, _) = encoder(ms.float32), encoder(ms.float16)
    assert relative(narrow(narrow_inputs).asnumpy(), wide(wide_inputs).asnumpy()) < 1e-2
