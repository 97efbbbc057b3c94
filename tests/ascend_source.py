"""What a reading of the source finds: operations not documented for Ascend, and operators that work in place there."""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOR_CPU = "cpu.py", "cpu_functions.py", "cpu_constructs.py"
OURS = [path for path in sorted((ROOT / "pipeline").rglob("*.py")) if path.name not in FOR_CPU]
"""All but the substitutes for CPU."""

NAMESPACES = {"ops": "mindspore.ops", "mint": "mindspore.mint", "P": "mindspore.ops.operations"}
PLATFORMS = re.compile(r"Supported Platforms:\s*\n\s*(.*)")


class InPlace(NamedTuple):
    """An operator that works in place on Ascend, where it is applied to tensors."""

    file: str
    function: str
    code: str


# --- operations ---------------------------------------------------------------------------------------------------


def operations(source: str) -> set[str]:
    """The ``ops.x``, ``mint.x.y`` and ``P.X`` that a module's source names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in NAMESPACES:
            found.add(".".join([node.id, *parts]))
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def documented(paths: Iterable[Path]) -> dict[str, str]:
    """The `platforms` of all operations that files name, by operation; where nothing is substituted."""
    return {name: platforms(name) for path in paths for name in operations(path.read_text())}


def platforms(operation: str) -> str:
    """What MindSpore's documentation says of the devices that an operation is for; "" where it says nothing."""
    first, *names = operation.split(".")
    found = functools.reduce(getattr, names, importlib.import_module(NAMESPACES[first]))
    match = PLATFORMS.search(inspect.getdoc(found) or "")
    return match[1] if match else ""


# --- in place -----------------------------------------------------------------------------------------------------


def in_place(cells: Iterable) -> list[InPlace]:
    """Those in the constructs of cells, and in the functions of mindone that these may call, by name."""
    classes = {
        base for cell in cells for each in (cell, getattr(cell, "processor", None)) for base in type(each).__mro__
    }
    classes = {each for each in classes if each.__module__.startswith("mindone.")}
    modules = {each.__module__ for each in classes}
    modules |= {name for module in set(modules) for name in _imported(module)}
    known = dict(_functions(modules, {f"{each.__module__}.{each.__qualname__}" for each in classes}))
    by_name: dict[str, list] = {}
    for place in known:
        by_name.setdefault(place[1].rpartition(".")[2], []).append(place)
    reached, new = set(), {place for place in known if place[1].endswith((".construct", ".__call__"))}
    while new:
        reached |= new
        called = {name for place in new for name in _called(known[place])}
        new = {place for name in called for place in by_name.get(name, ())} - reached
    found = {InPlace(*place, code) for place in reached for code in operators(known[place])}
    return sorted(found)


def operators(function: ast.AST) -> Iterator[str]:
    """The in-place operators of a function, as code: ``x += y``, ``x[i] = y``, ``x.add_(y)``."""
    for node in ast.walk(function):
        match node:
            case ast.AugAssign(value=ast.Tuple() | ast.List() | ast.Constant()):
                pass
            case ast.AugAssign() | ast.Assign(targets=[ast.Subscript()]):
                yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(attr=name)) if name.endswith("_") and not name.endswith("__"):
                yield ast.unparse(node)


def _imported(module: str) -> Iterator[str]:
    """The modules of mindone that a module imports functions from."""
    for node in ast.walk(_parsed(module)):
        if isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*package, *([node.module] if node.module else [])])
            if name.startswith("mindone.") and importlib.util.find_spec(name):
                yield name


def _functions(modules: Iterable[str], classes: set[str]) -> Iterator[tuple[tuple[str, str], ast.AST]]:
    """All functions of modules, and the methods of classes, by file and name."""
    for module in modules:
        file = module.replace(".", "/") + ".py"
        for node in _parsed(module).body:
            if isinstance(node, ast.FunctionDef):
                yield (file, node.name), node
            elif isinstance(node, ast.ClassDef) and f"{module}.{node.name}" in classes:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        yield (file, f"{node.name}.{method.name}"), method


@functools.cache
def _parsed(module: str) -> ast.Module:
    return ast.parse(Path(importlib.util.find_spec(module).origin).read_text())


def _called(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            yield node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
