"""Each substitute in `pipeline.devices.cpu`, called by the name it replaces, against NumPy in float64; why each exists.

Run as a program, this file prints, for every substitute, what its original does on this machine's CPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.doctor.kernel_cases import CASES, key
from pipeline.doctor.kernels import TOLERANCE, error, expected, outputs_and_gradients, parameters
from pipeline.doctor.numpy_layers import np_attention


@pytest.mark.parametrize("mode", ["pynative", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_substitute_and_its_gradient_equal_numpy(cpu, case, dtype, mode):
    outputs, gradients = outputs_and_gradients(case, dtype, mode)
    expected_outputs, expected_gradients = expected(case, dtype)
    assert len(outputs) == len(expected_outputs) and len(gradients) == len(expected_gradients)
    for actual, wanted in zip(outputs + gradients, expected_outputs + expected_gradients):
        assert error(actual, wanted) <= TOLERANCE[dtype]
    if case.keeps_dtype:
        assert {str(output.dtype) for output in outputs} == {"Float16" if dtype == "float16" else "Float32"}


def test_every_substitute_is_reached_by_a_case_that_compares_it_with_numpy(cpu):
    from pipeline.devices import cpu as module

    codes = {key(substitute): substitute.replacement.__code__ for substitute in module.substitutes()}
    assert set(codes) == {case.covers for case in CASES}
    for case in CASES:
        called = set()
        sys.setprofile(lambda frame, event, _, called=called: called.add(frame.f_code) if event == "call" else None)
        try:
            outputs_and_gradients(case, "float32", "pynative")
        finally:
            sys.setprofile(None)
        assert codes[case.covers] in called, f"{case.name} does not reach {case.covers}"


@pytest.mark.parametrize("mode", ["pynative", "jit"])
@pytest.mark.parametrize("name", ["Linear", "Linear without bias", "Conv2d"])
def test_to_float_computes_in_half_and_keeps_the_gradients_of_fp32_parameters_in_fp32(cpu, name, mode):
    import mindspore as ms

    case = next(case for case in CASES if case.name == name)
    for compute in (ms.float16, ms.float32):
        half = dataclasses.replace(case, build=lambda compute=compute: case.build().to_float(compute))
        outputs, gradients = outputs_and_gradients(half, "float32", mode)
        assert [output.dtype for output in outputs] == [compute]
        assert {gradient.dtype for gradient in gradients} == {ms.float32}
        for actual, wanted in zip(outputs + gradients, sum(expected(case, "float32"), [])):
            assert error(actual, wanted) <= TOLERANCE["float16" if compute == ms.float16 else "float32"]


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_linear_refuses_parameters_of_another_dtype_than_its_input(cpu, mode, tmp_path, monkeypatch):
    import mindspore as ms
    from mindspore import mint

    monkeypatch.chdir(tmp_path)  # the compiler leaves a report of its failure where it runs
    cell = mint.nn.Linear(6, 4)

    def call(x):
        return cell(x)

    with pytest.raises(TypeError):
        (ms.jit(call) if mode == "jit" else call)(ms.Tensor(np.ones((2, 6)), ms.float16))


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_attention_casts_keys_and_values_to_the_dtype_of_the_query(cpu, mode):
    import mindspore as ms
    from mindone.diffusers.models import attention_dispatch

    case = next(case for case in CASES if case.name == "attention")
    query, key, value = case.arrays("float16")

    def attention(query, key, value):
        return attention_dispatch.dispatch_attention_fn(query, key, value)

    call = ms.jit(attention) if mode == "jit" else attention
    result = call(ms.Tensor(query, ms.float32), ms.Tensor(key, ms.float16), ms.Tensor(value, ms.float16))
    assert result.dtype == ms.float32
    assert error(result, np_attention(query, key, value)) <= TOLERANCE["float32"]


def test_arange_has_the_values_and_the_dtype_of_mints_documentation(cpu):
    import mindspore as ms
    from mindspore import mint

    for arguments, options, values, dtype in (
        ((3,), {}, [0, 1, 2], ms.int64),
        ((1, 4), {}, [1, 2, 3], ms.int64),
        ((0, 1, 0.25), {}, [0, 0.25, 0.5, 0.75], ms.float32),
        ((4, 0, -2), {"dtype": ms.float16}, [4, 2], ms.float16),
        ((), {"start": 1, "end": 3}, [1, 2], ms.int64),
    ):
        result = mint.arange(*arguments, **options)
        assert result.asnumpy().tolist() == values and result.dtype == dtype


def test_filled_tensors_have_the_dtype_that_was_asked_for(cpu):
    import mindspore as ms
    from mindspore import mint

    x = ms.Tensor(np.ones((2, 3)), ms.float16)
    assert (mint.zeros_like(x, dtype=ms.int32).dtype, mint.ones_like(x, dtype=ms.bool_).dtype) == (ms.int32, ms.bool_)
    assert (mint.full((2,), 2.5).dtype, mint.full((2,), 2).dtype) == (ms.float32, ms.int64)


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_gelu_and_its_gradient_are_finite_over_all_of_fp16(cpu, mode):
    import mindspore as ms
    from mindspore.mint.nn import functional

    def gelu(x):
        return functional.gelu(x, approximate="tanh").sum()

    differentiate = ms.value_and_grad(gelu)
    x = np.array([-65504, -300, -11, 11, 300], np.float16)
    total, gradient = (ms.jit(differentiate) if mode == "jit" else differentiate)(ms.Tensor(x))
    assert total.asnumpy() == np.float16(311)
    np.testing.assert_array_equal(gradient.asnumpy(), [0, 0, 0, 1, 1])


def test_timestep_embedding_is_as_exact_as_float32_allows(cpu):
    """At 1000 the spacing of float32 is 6e-5; with frequencies from the CPU's own ``exp`` it was off by 1e-3."""
    import mindspore as ms
    from mindone.diffusers.models import embeddings

    timesteps = np.array([937.123, 12.5, 500.0, 1000.0], np.float32)
    found = embeddings.get_timestep_embedding(ms.Tensor(timesteps), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    angles = np.outer(timesteps.astype(np.float64), np.exp(-np.log(10000) * np.arange(128) / 128))
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(found.asnumpy(), expected, atol=1e-4)


def lora_layer(**changes):
    from mindone.peft.tuners.lora.layer import Linear
    from mindspore import mint

    layer = Linear(mint.nn.Linear(4, 4), "default", r=2)
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def test_forms_that_a_substitute_does_not_compute_are_refused(cpu):
    import mindspore as ms
    import mindspore.mint.nn.functional as F
    from mindone.diffusers.models import attention_dispatch, embeddings
    from mindspore import mint

    x, ids = ms.Tensor(np.ones((2, 3, 2, 4)), ms.float32), ms.Tensor([[0, 1]])
    weight, angles = ms.Tensor(np.ones((3, 4)), ms.float32), ms.Tensor(np.ones(3), ms.float32)
    for call in (
        lambda: attention_dispatch.dispatch_attention_fn(x, x, x, is_causal=True),
        lambda: attention_dispatch.dispatch_attention_fn(x, x, x, dropout_p=0.1),
        lambda: attention_dispatch.dispatch_attention_fn(x, x, x, enable_gqa=True),
        lambda: embeddings.apply_rotary_emb(x, (weight, weight), sequence_dim=2),
        lambda: embeddings.apply_rotary_emb(x, (weight, weight), use_real_unbind_dim=-2, sequence_dim=1),
        lambda: embeddings.get_1d_rotary_pos_embed(4, angles),
        lambda: F.embedding(ids, weight, padding_idx=0),
        lambda: mint.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")(x.permute(0, 1, 3, 2)),
        lambda: lora_layer(use_dora={"default": True})(x),
        lambda: lora_layer(merged_adapters=["default"], _disable_adapters=True)(x),
    ):
        with pytest.raises(NotImplementedError, match="on CPU"):
            call()


# --- why each exists ----------------------------------------------------------------------------------------------


def probe():
    """What each original does while all other substitutes are in place: "" where it computes, else its error."""
    from pipeline.devices import cpu, device

    originals = []
    real_install = cpu.install
    cpu.install = lambda: originals.extend(getattr(s.owner, s.name) for s in cpu.substitutes())
    device.use("CPU")
    real_install()
    errors = {}
    for substitute, original in zip(cpu.substitutes(), originals):
        _put(substitute, original)
        case = next(case for case in CASES if case.covers == key(substitute))
        try:
            if not substitute.compiled:  # a forward that fails while gradients are recorded spoils the next gradient
                results(case)
            outputs_and_gradients(case, "float32", "jit" if substitute.compiled else "pynative")
            errors[key(substitute)] = ""
        except Exception as error:
            errors[key(substitute)] = f"{type(error).__name__}: {error}"
        real_install()
    return errors


def results(case):
    import mindspore as ms

    target, _, _ = parameters(case, "float32")
    return target(*[ms.Tensor(array.astype(np.float32)) for array in case.arrays("float32")])


def _put(substitute, original):
    from pipeline.devices import cpu

    if isinstance(substitute.owner, type):
        setattr(substitute.owner, substitute.name, original)
    else:
        cpu.replace_everywhere(substitute.replacement, original)


@pytest.fixture(scope="module")
def errors_of_originals(tmp_path_factory):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    folder = tmp_path_factory.mktemp("originals")  # the compiler leaves reports of its failures where it runs
    command, options = [sys.executable, __file__], {"capture_output": True, "text": True, "timeout": 300}
    child = subprocess.run(command, env=environment, cwd=folder, **options)
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", dict.fromkeys(case.covers for case in CASES))
def test_kernel_is_still_missing(cpu, errors_of_originals, name):
    """Or, for a substitute that is only faster or for an older MindSpore: its original works."""
    import mindspore as ms

    from pipeline.devices import cpu as module

    substitute = next(substitute for substitute in module.substitutes() if key(substitute) == name)
    installed = tuple(int(number) for number in ms.__version__.split(".")[:2])
    works = substitute.fails_before is not None and installed >= substitute.fails_before
    reason = "" if works else substitute.fails_with
    error = errors_of_originals[name]
    assert error or not reason, f"MindSpore {ms.__version__} computes {name} on CPU now: delete its substitute"
    assert reason or not error, f"the original of {name} is to work here, but fails: {error}"
    assert not error or error.startswith("RuntimeError") and reason in error, f"not for want of {reason}: {error}"


if __name__ == "__main__":
    print(json.dumps(probe()))
