"""The audit for Ascend that needs no NPU: what the graphs of all models ask of the plugin, and in which dtypes.

``python tests/audit.py [DTYPE ...]`` compiles them under each policy (minutes) and prints what docs/ascend.md lists.
"""

import ast
import functools
import importlib.util
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from ascend_graphs import NAMES, ROOT, Row, compiled
from ascend_plugin import ways_of

DTYPES = {"bf16": "BFloat16", "fp16": "Float16", "fp32": "Float32"}
PYTHON = {"PyExecute"}
"""What stays Python in a compiled T5, which the pipeline never compiles."""

PRODUCTS = {
    *("MatMul", "MatMulExt", "BatchMatMul", "BatchMatMulExt", "Dense", "BiasAdd"),
    *("Conv2DExt", "Conv2D", "FlashAttentionScore", "FlashAttentionScoreGrad"),
}
FUSED = {"FlashAttentionScore", "FlashAttentionScoreGrad"}
"""Their statistics, the maximum and the sum of exponentials, are float32."""

PREDICTION = {
    "attention's statistics": {"flash_attention_op"},
    "RMS norm": {"RMSNorm.construct"},
    "rotary embedding": {"apply_rotary_emb", "get_1d_rotary_pos_embed"},
    "timestep embedding": {"get_timestep_embedding"},
    "loss": {"item_loss.losses", "flow_loss.loss"},
}
ISLANDS = {
    "lora": PREDICTION | {"dropout's hash": {"_make_dropout.SeededDropout.construct", "_make_dropout.shifted"}},
    "controlnet": PREDICTION | {"RMS norm of queries and keys": {"FluxAttnProcessor.__call__"}},
    "vae encode": {"attention's statistics": {"Attention.flash_attention_op"}},
    "vae decode": {"attention's statistics": {"Attention.flash_attention_op"}},
    "clip": {},
    "t5": {
        "RMS norm": {"T5LayerNorm.construct", "T5LayerFF.construct"},
        "GELU": {"NewGELUActivation.construct"},
    },
}
"""What is computed in float32 where the policy is half: functions, by what they do, of each graph."""

PREDICTION_SHARED = {
    *("LayerNormExt", "LayerNormGradExt"),
    *("PowTensorScalar", "MeanExt", "SumExt", "Rsqrt", "RsqrtGrad", "Add", "AddN", "Div", "Mul", "Muls", "Tile"),
    *("Outer", "RepeatInterleaveInt", "Cos", "Sin", "Exp", "Concat", "SplitWithSize", "StridedSlice", "ExpandDims"),
    *("ReduceMean", "RealDiv", "Reshape"),
}
"""Layer norm; RMS norm and the gradients; both embeddings, positions and timestep; the loss."""

SHARED = {
    "lora": PREDICTION_SHARED - {"SumExt"},
    "controlnet": PREDICTION_SHARED - {"SumExt"},
    "vae encode": set(),
    "vae decode": {"UpsampleNearest2D"},
    "clip": {"LayerNorm"},
    "t5": {"Add", "ExpandDims", "Pow", "ReduceMean", "Rsqrt", "Softmax", "StridedSlice", "Tanh"},
}
"""Primitives in float32 beside these, by graph: of MindSpore's own functions, which stand for all their callers."""

SHARED_IN_FP16 = SHARED | {"vae decode": set(), "t5": SHARED["t5"] | {"MatMul", "Reshape"}}
"""mindone upsamples in float32 for bfloat16 alone; in float16 it keeps T5's ``wo`` in float32, else it overflows."""

SINCE_2_8 = {"Div": {"Divs"}, "SplitWithSize": {"SplitWithSizeView"}, "Tanh": set()}
"""What stands for these from MindSpore 2.8 on: Divs divides by a number; of Tanh MindSpore says who asked for it."""


def findings(dtype: str, counts: Mapping[Row, int]) -> list[str]:
    """What is wrong with the graphs under a policy of ``dtype``; one line each."""
    found = set()
    for row in counts:
        types = {*row.inputs, *row.outputs}
        if row.primitive not in PYTHON and not ways_of(row.primitive):
            found.add(f"{row.graph}: the plugin has no {row.primitive}, {row.line}")
        if "Float64" in types:
            found.add(f"{row.graph}: {row.primitive} is float64, {row.line}")
        foreign = types & (set(DTYPES.values()) - {DTYPES[dtype], "Float32"})
        if foreign:
            found.add(f"{row.graph}: {row.primitive} is {foreign.pop()} under {dtype}, {row.line}")
        if is_wide(dtype, row):
            found.add(f"{row.graph}: {row.primitive} takes Float32 under {dtype}, {row.line}")
    return sorted(found | set(_islands_amiss(dtype, counts)))


def is_wide(dtype: str, row: Row) -> bool:
    """Whether a product takes float32 where the policy is half; T5 in float16 does, see SHARED_IN_FP16."""
    if dtype == "fp32" or row.primitive not in PRODUCTS or (dtype, row.graph) == ("fp16", "t5"):
        return False
    if row.primitive in FUSED:
        return "Float32" in row.inputs[:3]
    return "Float32" in row.inputs


def islands(counts: Mapping[Row, int]) -> dict[str, set[str]]:
    """The functions that compute in float32, by graph; casts to it and from it are not counted."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in counts:
        if row.line and row.primitive != "Cast" and "Float32" in (*row.inputs, *row.outputs):
            found[row.graph].add(function_at(row.line))
    return found


def shared(counts: Mapping[Row, int]) -> dict[str, set[str]]:
    """The float32 primitives by graph of which MindSpore does not say who asked for them."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in counts:
        if not row.line and row.primitive != "Cast" and "Float32" in (*row.inputs, *row.outputs):
            found[row.graph].add(row.primitive)
    return found


def expected_shared(dtype: str, graph: str) -> set[str]:
    """What `shared` is to find under a half policy, with the installed MindSpore."""
    names = (SHARED_IN_FP16 if dtype == "fp16" else SHARED)[graph]
    if tuple(map(int, version("mindspore").split(".")[:2])) < (2, 8):
        return names
    return set().union(*(SINCE_2_8.get(name, {name}) for name in names))


def _islands_amiss(dtype: str, counts: Mapping[Row, int]) -> Iterator[str]:
    if dtype == "fp32":
        return
    for graph in {row.graph for row in counts} & set(ISLANDS):
        wanted = set().union(*ISLANDS[graph].values())
        real = islands(counts)[graph]
        yield from (f"{graph}: {name} is computed in float32 under {dtype}" for name in real - wanted)
        yield from (f"{graph}: {name} is not computed in float32 under {dtype}" for name in wanted - real)
        if differing := sorted(shared(counts)[graph] ^ expected_shared(dtype, graph)):
            yield f"{graph}: {', '.join(differing)} of MindSpore's functions in float32, or no more, under {dtype}"


def function_at(line: str) -> str:
    """The name of the innermost function or method at ``file:number``."""
    file, _, number = line.rpartition(":")
    around = [name for first, last, name in _functions(file) if first <= int(number) <= last]
    return around[-1] if around else file


@functools.cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    path = ROOT / file
    if not path.exists():
        path = Path(importlib.util.find_spec(file.partition("/")[0]).origin).parents[1] / file
    found = []

    def look_into(node, names):
        for child in ast.iter_child_nodes(node):
            inside = names
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = [*names, child.name]
                found.append((child.lineno, child.end_lineno, ".".join(inside)))
            look_into(child, inside)

    look_into(ast.parse(path.read_text()), [])
    return found


# --- the list -----------------------------------------------------------------------------------------------------


def table(counts: Mapping[Row, int]) -> str:
    """A line for a primitive: how Ascend computes it, how often it is asked for, in which dtypes."""
    dtypes: dict[str, set[str]] = defaultdict(set)
    totals: Counter[str] = Counter()
    for row, number in counts.items():
        dtypes[row.primitive] |= {*row.inputs, *row.outputs}
        totals[row.primitive] += number
    lines = ["| primitive | nodes | dtypes | Ascend |", "|---|---|---|---|"]
    for name in sorted(totals):
        lines.append(f"| {name} | {totals[name]} | {', '.join(sorted(dtypes[name]))} | {', '.join(ways_of(name))} |")
    return "\n".join(lines)


def main(dtypes: list[str]) -> int:
    wrong = []
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as folder:
            counts = compiled(dtype, Path(folder), NAMES)
        wrong += findings(dtype, counts)
        print(f"\n{dtype}: {sum(counts.values())} nodes\n\n{table(counts)}\n")
        for graph, names in sorted(islands(counts).items() if dtype != "fp32" else ()):
            print(f"float32 in {graph}: {', '.join(sorted(names))}; {', '.join(sorted(shared(counts)[graph]))}")
    print("\n".join(["", *wrong, f"{len(wrong)} findings"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(DTYPES)))
