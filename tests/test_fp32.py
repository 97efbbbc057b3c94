"""float32 is float32: attention on Ascend, and what a device that rounds is refused for."""

import numpy as np
import pytest

from pipeline.devices import dtypes, fp32
from pipeline.devices.precision import Policy
from pipeline.doctor.numpy_layers import np_attention
from pipeline.errors import UserError

FP32, FP16 = Policy("fp32", "fp32", "fp32"), Policy("fp16", "fp16", "fp16")
ALL = ("matmul", "convolution", "attention")


def found(dtype):
    return {"parameters": {dtype: 1}, "output": dtype}


def test_this_device_computes_float32_in_float32(cpu):
    assert fp32.rounding_operations() == () and tuple(fp32.probes()) == ALL
    dtypes.check("vae", FP32, found("float32"))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits", [8, 11], ids=["bfloat16", "float16, HF32"])
def test_an_operation_that_rounds_its_inputs_is_found_and_the_policy_refused(cpu, monkeypatch, name, bits):
    import mindspore as ms

    exact = fp32.probes()

    def rounded(x):
        shift = np.uint32(24 - bits)
        kept = ms.Tensor((x.asnumpy().view(np.uint32) >> shift << shift).view(np.float32))
        return exact[name](kept)

    monkeypatch.setattr(fp32, "probes", lambda: exact | {name: rounded})
    monkeypatch.setattr(fp32, "rounding_operations", fp32.rounding_operations.__wrapped__)
    assert fp32.rounding_operations() == (name,)
    with pytest.raises(UserError, match=f"vae: the policy asks for float32, but .* the inputs of {name} to fewer bits"):
        dtypes.check("vae", FP32, found("float32"))
    dtypes.check("vae", FP16, found("float16"))


def test_only_of_float32_the_attention_on_ascend_is_not_mindones(cpu, monkeypatch):
    import mindspore as ms

    from pipeline.devices import ascend

    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 5, 4, 8))
    tensors = [ms.Tensor(each, ms.float32) for each in (query, key, value)]
    monkeypatch.setattr(ascend, "_mindones_attention", lambda *inputs, **options: "mindone's")
    np.testing.assert_allclose(ascend.dispatch_attention_fn(*tensors), np_attention(query, key, value), atol=1e-5)
    for half in (ms.float16, ms.bfloat16):
        assert ascend.dispatch_attention_fn(*[each.astype(half) for each in tensors]) == "mindone's"


def test_no_attention_of_a_loaded_model_is_rounded_to_float16(cpu):
    from mindone.diffusers.models.attention_processor import Attention

    from pipeline.flux import models
    from pipeline.settings.experiment import EMBEDDED

    layers = [cell for _, cell in models.load_model(EMBEDDED, "vae", "fp32").cells_and_names()]
    attention = [cell for cell in layers if isinstance(cell, Attention)]
    assert len(attention) == 2 and {cell.fa_force_dtype for cell in attention} == {None}


def test_a_switch_that_mindspore_does_not_take_ends_in_one_line(cpu):
    from mindspore.device_context.ascend import op_precision

    from pipeline.devices import ascend

    with pytest.raises(UserError, match="^device: cannot set conv_allow_hf32 to no: .* call device.use before"):
        for _ in range(2):  # without an NPU MindSpore looks at nothing the first time
            ascend._tell(op_precision.conv_allow_hf32, "no")
