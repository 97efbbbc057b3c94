"""Which way imports point inside the store's package."""

import ast
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / "cache"


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; this test reads absolute ones"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((CACHE / "core").glob("*.py")), ids=lambda path: path.stem)
def test_the_core_imports_only_the_core_of_its_own_package(path):
    assert [name for name in imported(path) if name.startswith("cache") and not name.startswith("cache.core.")] == []


@pytest.mark.parametrize("path", sorted(CACHE.rglob("*.py")), ids=lambda path: str(path.relative_to(CACHE)))
def test_no_file_of_the_store_imports_what_stands_above_it(path):
    above = {"pipeline", "tasks", "luigi", "mindspore"}
    assert [name for name in imported(path) if name.partition(".")[0] in above] == []
