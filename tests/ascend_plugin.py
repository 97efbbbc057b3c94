"""What the Ascend plugin in MindSpore's wheel registers, read from its files, which needs no NPU and no CANN."""

import functools
import importlib.util
import re
from pathlib import Path

IDENTIFIER = re.compile(rb"(?<=[A-Za-z_])(\d{1,2})(?=[A-Z])")
"""The length that an identifier stands behind in a C++ symbol."""

ADAPTER = re.compile(rb"OpAdapterINS1_\d+cz([A-Za-z0-9]+?)EE")
AI_CPU = re.compile(r"AiCPURegOp\(\"(\w+)\"\)")
VIEW = re.compile(rb"9mindspore6kernel\d+([A-Za-z0-9]+View)ESaI")
REWRITTEN = re.compile(rb"3opt\d+([A-Za-z0-9]+?)UnifyMindIR")
CANN_NAMES = {"Adam": "ApplyAdam", "Argmax": "ArgMaxV2", "Gather": "GatherV2"}
"""Operators that CANN has under another name than MindSpore."""

FALLS_BACK = {"FlattenExt"}
"""MindSpore rewrites FlattenExt as Reshape where a device has no kernel, as 2.8 and later have none for Ascend.  The
wheel has no symbol for that; backend/common/expander/fallback in MindSpore's source has the rule."""


def ways_of(primitive: str) -> tuple[str, ...]:
    """How a primitive is computed on Ascend, by the keys of `registered`; empty where the plugin does not know it."""
    both = {primitive, CANN_NAMES.get(primitive, primitive)}
    return tuple(way for way, names in registered().items() if both & names)


@functools.cache
def registered() -> dict[str, frozenset[str]]:
    """The names of primitives: ``aclnn``, which call a function of CANN's library of that name; ``acl``, which are
    described to CANN as an operator; ``AI CPU``, which CANN can compute on the NPU's few general cores; ``rewritten``,
    which MindSpore replaces by others first; ``view``, from MindSpore 2.8 on, views of which the host computes the
    strides.
    """
    package = Path(importlib.util.find_spec("mindspore").origin).parent
    operators = (package / "lib/plugin/libmindspore_ops_ascend.so").read_bytes()
    manager = (package / "lib/plugin/ascend/libmindspore_ascend_res_manager.so").read_bytes()
    backend = (package / "lib/libmindspore_backend_common.so").read_bytes()
    classes, described = _classes(operators), (package / "ops/_op_impl/aicpu").glob("*.py")
    found = {
        "aclnn": {name.removesuffix("Ascend") for name in classes},
        "acl": {name.decode() for name in ADAPTER.findall(manager)},
        "AI CPU": {name for path in described for name in AI_CPU.findall(path.read_text())},
        "rewritten": {name.decode() for name in REWRITTEN.findall(backend)},
    }
    host = package / "lib/libmindspore_ops_host.so"
    if host.exists():  # 2.7 has its views, and what falls back, among the classes of ``aclnn``
        found["rewritten"] |= FALLS_BACK
        found["view"] = {name.decode() for name in VIEW.findall(host.read_bytes())}
    return {way: frozenset(names) for way, names in found.items()}


def _classes(library: bytes) -> set[str]:
    """The classes whose names end in Ascend, of a library's symbols."""
    names = {library[match.end() : match.end() + int(match[1])] for match in IDENTIFIER.finditer(library)}
    return {name.decode() for name in names if name.endswith(b"Ascend") and name.isalnum()}
