"""What a CPU can tell of Ascend.  Nothing here ran on an NPU; docs/ascend.md says what that leaves open."""

import json
import operator
import sys

import ascend_source
import audit
import numpy as np
import pytest
from ascend_graphs import NAMES, ROOT, Row, compiled, rows
from ascend_plugin import registered, ways_of
from ascend_source import OURS

MET = {
    ("T5Attention.construct", "scores += position_bias_masked"),
    ("FluxTransformerBlock.construct", "norm_encoder_hidden_states *= 1 + c_scale_mlp.expand_dims(axis=1)"),
    ("FluxTransformerBlock.construct", "norm_encoder_hidden_states += c_shift_mlp.expand_dims(axis=1)"),
}
"""The in-place operators that FLUX.1's models really come to, by function and code."""

PASSED_BY = {
    "dispatch_attention_fn": "a dictionary",
    "Attention.scaled_dot_product_attention": "there is no mask",
    "FluxAttention.scaled_dot_product_attention": "not called: dispatch_attention_fn is",
    "math_attention_op": "float32 alone, and of this ours is called",
    "scaled_dot_product_attention": "mindone's CLIP and T5 do not call it",
    "AutoencoderKL.blend_h": "no tiles",
    "AutoencoderKL.blend_v": "no tiles",
    "T5Attention._relative_position_bucket": "pipeline.flux.t5 has the buckets",
    "T5Attention.construct": "no pruned heads, no earlier tokens",
    "T5Stack._prepare_4d_causal_attention_mask_with_cache_position": "a decoder's",
}
"""Functions whose other in-place operators are in the source, but not come to; why."""


# --- our own operations -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """What CLIP asks of Ascend in bf16, and the folder with what else was found in that process."""
    folder = tmp_path_factory.mktemp("clip")
    return compiled("bf16", folder, ["clip"]), folder


def test_every_operation_that_we_call_is_documented_for_ascend(clip):
    platforms = json.loads((clip[1] / "documented.json").read_text())
    assert {"ops.assign", "mint.arange", "mint.nn.functional.conv2d", "P.BatchMatMul"} < set(platforms)
    assert not {name for name, devices in platforms.items() if "Ascend" not in devices}


def test_an_operation_that_is_not_for_ascend_is_found(cpu, tmp_path):
    path = tmp_path / "ours.py"
    path.write_text("def f(x):\n    return ops.range(x) + ops.cos(x)")
    assert ascend_source.documented([path]) == {"ops.range": "``GPU`` ``CPU``", "ops.cos": "``Ascend`` ``GPU`` ``CPU``"}


def test_no_operation_of_ours_names_float64(cpu):
    def naming(source):
        return "ms.float64" in source or "ms.double" in source

    assert naming("x.astype(ms.float64)")
    assert not [path for path in OURS if naming(path.read_text())]


# --- in place -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(cpu):
    """The models that come with the package, by name, in float32."""
    from pipeline.devices.precision import Policy
    from pipeline.flux import models
    from pipeline.methods import controlnet_model
    from pipeline.settings.experiment import EMBEDDED, Experiment
    from pipeline.settings.fields import ControlNet

    found = {name: models.load_model(EMBEDDED, name, "fp32") for name in ("transformer", "vae", "text_encoder_2")}
    found["text_encoder"] = models.load_model(EMBEDDED, "text_encoder", "fp32")
    experiment = Experiment(controlnet=ControlNet(num_double_layers=1, num_single_layers=1))
    fp32 = Policy("fp32", "fp32", "fp32")
    return found | {"controlnet": controlnet_model.make(found["transformer"], experiment, fp32)}


def outputs(networks) -> list[np.ndarray]:
    """What all models make of fixed inputs; the transformer first."""
    import mindspore as ms

    def tensor(*shape):
        values = np.random.default_rng(sum(shape)).standard_normal(shape)
        return ms.Tensor(values.astype(np.float32))

    tokens, ids = ms.Tensor(np.ones((1, 9), np.int32)), (tensor(16, 3), tensor(5, 3))
    level = ms.Tensor([0.5], ms.float32)
    x, txt, pooled = tensor(1, 16, 64), tensor(1, 5, 96), tensor(1, 64)
    double, single = networks["controlnet"](x, x, None, 1.0, txt, pooled, level, *ids, level)
    results = [
        networks["transformer"](x, txt, pooled, level, *ids, level, None, double, single)[0],
        *(*double, *single),
        networks["vae"].decode(tensor(1, 16, 4, 4))[0],
        networks["vae"].encode(tensor(1, 3, 16, 16))[0],
        networks["text_encoder"](tokens)[1],
        networks["text_encoder_2"](tokens)[0],
    ]
    return [result.asnumpy() for result in results]


@pytest.fixture(scope="module")
def plain(networks):
    return outputs(networks)


@pytest.fixture
def in_place(monkeypatch):
    """Tensors' in-place operators as on Ascend: in their own memory, so in their own shape and dtype.

    What it returns: by (function, line number), the dtypes of both operands of each that was met.
    """
    import mindspore as ms

    met: dict[tuple[str, int], tuple] = {}

    def in_own_memory(compute):
        def apply(self, other):
            caller = sys._getframe(1)
            met[caller.f_code.co_qualname, caller.f_lineno] = str(self.dtype), str(getattr(other, "dtype", ""))
            result = compute(self, other)
            assert (result.dtype, result.shape) == (self.dtype, self.shape), "the operator needs other memory"
            return self.copy_(result)

        return apply

    for name in ("iadd", "isub", "imul", "itruediv"):
        monkeypatch.setattr(ms.Tensor, f"__{name}__", in_own_memory(getattr(operator, name[1:])))
    return met


def test_the_source_has_no_other_in_place_operators_than_are_known(networks):
    found = ascend_source.in_place(cell for network in networks.values() for _, cell in network.cells_and_names())
    known = {(each.function, each.code) for each in found}
    assert known >= MET
    assert {function for function, _ in known - MET} == set(PASSED_BY)


def test_in_place_operators_of_all_kinds_are_found_in_source():
    import ast

    code = "def f(x, y):\n    x += y\n    x[0] = y\n    x.add_(y)\n    x += (1,)\n    x.__len__()\n    return x + y"
    assert list(ascend_source.operators(ast.parse(code))) == ["x += y", "x[0] = y", "x.add_(y)"]


def test_operators_that_work_in_place_on_ascend_change_no_output(networks, plain, in_place):
    for found, expected in zip(outputs(networks), plain, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {function for function, _ in in_place} == {function for function, _ in MET} and len(in_place) == len(MET)


def test_an_operator_that_changes_what_another_still_needs_is_found(in_place):
    import mindspore as ms

    def residual(x):
        y = x
        y *= ms.Tensor(2, ms.float32)
        return x + y

    assert residual(ms.Tensor([1], ms.float32)).asnumpy() == [4]  # where y has memory of its own, 3


def test_an_operator_on_half_with_float32_is_found(in_place):
    import mindspore as ms

    x = ms.Tensor(np.ones(3), ms.float16)
    with pytest.raises(AssertionError, match="needs other memory"):
        x *= ms.Tensor(np.ones(3), ms.float32)


# --- graphs -------------------------------------------------------------------------------------------------------

SMALL = """
subgraph @1_fn() {
  %0(x) = PrimFunc_MatMul(%para1_x, %para2_w, Bool(0), Bool(1)) {instance name: matmul}
      : (<Tensor[BFloat16], (2, 3)>, <Ref[Tensor[BFloat16]], (4, 3)>) -> (<Tensor[BFloat16], (2, 4)>)
      # In file /x/site-packages/mindone/diffusers/models/embeddings.py:1/x/
  %1(y) = PrimFunc_Cast(%0, I64(43))
      : (<Tensor[BFloat16], (2, 4)>, <Int64, NoShape>) -> (<Tensor[Float32], (2, 4)>)
      # In file /x/site-packages/mindone/diffusers/models/embeddings.py:1/x/
      # In file /x/site-packages/mindspore/ops/auto_generate/gen_ops_def.py:8677, 11~31/x/
  %2(z) = Depend(%1, U)
      : (<Tensor[Float32], (2, 4)>) -> (<Tensor[Float32], (2, 4)>)
"""


def test_a_graph_is_read_as_mindspore_writes_it(tmp_path):
    path = tmp_path / "graph.ir"
    path.write_text(SMALL)
    assert list(rows("g", path)) == [
        Row("g", "MatMul", ("BFloat16", "BFloat16"), ("BFloat16",), "mindone/diffusers/models/embeddings.py:1"),
        Row("g", "Cast", ("BFloat16",), ("Float32",), ""),
    ]


def row(primitive, *inputs, graph="clip", output="BFloat16", line=""):
    return Row(graph, primitive, inputs, (output,), line)


@pytest.mark.parametrize(
    "bent, dtype, finding",
    [
        (row("Arangement", "BFloat16"), "bf16", "the plugin has no Arangement"),
        (row("Mul", "Float64", output="Float64"), "bf16", "Mul is float64"),
        (row("Mul", "BFloat16"), "fp32", "Mul is BFloat16 under fp32"),
        (row("FlashAttentionScore", *["Float16"] * 3, output="Float16"), "fp32", "FlashAttentionScore is Float16"),
        (row("Conv2DExt", "Float16", "Float16", output="Float32"), "fp32", "Conv2DExt is Float16 under fp32"),
        (row("Cast", "Float32", output="Float16"), "bf16", "Cast is Float16 under bf16"),
        (row("MatMul", "Float32", "Float32", output="Float32"), "bf16", "MatMul takes Float32 under bf16"),
        (row("FlashAttentionScore", *["Float32"] * 3), "fp16", "FlashAttentionScore takes Float32 under fp16"),
        (row("Softmax", "Float32", output="Float32"), "bf16", "Softmax of MindSpore's functions in float32"),
        (
            row("Mul", "Float32", line="mindone/transformers/models/clip/modeling_clip.py:1"),
            "bf16",
            "modeling_clip.py is computed in float32 under bf16",
        ),
    ],
    ids=lambda value: value.primitive if isinstance(value, Row) else str(value)[:20],
)
def test_every_kind_of_finding_is_made(bent, dtype, finding):
    assert any(finding in line for line in audit.findings(dtype, {bent: 1}))


def test_a_missing_island_is_a_finding():
    found = audit.findings("bf16", {row("Mul", "BFloat16", graph="t5"): 1})
    assert "t5: T5LayerNorm.construct is not computed in float32 under bf16" in found


def test_the_plugin_knows_what_documentation_says_and_nothing_made_up():
    assert all(len(names) > 10 for names in registered().values())
    for way, primitive in {"aclnn": "FlashAttentionScore", "acl": "BitwiseXor", "rewritten": "AdamWeightDecay"}.items():
        assert way in ways_of(primitive)
    assert ways_of("FlashAttentionScores") == ()
    assert ways_of("ChunkView"), "where the plugin has views depends on MindSpore's version"


def test_what_clip_asks_of_ascend_in_bf16(clip):
    counts, _ = clip
    assert sum(counts.values()) > 100 and audit.findings("bf16", counts) == []


def test_ascend_is_told_before_the_first_operation(clip):
    told = {name for name, is_told in json.loads((clip[1] / "told.json").read_text()).items() if is_told}
    assert told == {"HCCL_DETERMINISTIC", "precision_mode", "matmul_allow_hf32", "conv_allow_hf32"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", audit.DTYPES)
def test_what_all_graphs_ask_of_ascend(tmp_path, dtype):
    counts = compiled(dtype, tmp_path)
    assert {row.graph for row in counts} == set(NAMES)
    found = audit.findings(dtype, counts)
    assert not found, "\n".join(found)
    words = set((ROOT / "docs/ascend.md").read_text().split())
    assert {row.primitive for row in counts} - audit.PYTHON <= words, "docs/ascend.md does not list all primitives"


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["lora", "controlnet", "vae encode"])
def test_mindones_own_attention_in_float32_is_a_finding(tmp_path, graph):
    """It is why `pipeline.devices.ascend` has another one, and `fp32.keep_attention` exists."""
    counts = compiled("fp32", tmp_path, [graph], "mindone's")
    assert any("FlashAttentionScore is Float16 under fp32" in line for line in audit.findings("fp32", counts))
