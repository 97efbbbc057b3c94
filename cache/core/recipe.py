"""A recipe: all that decides the bytes of an entry besides its input, kept as recipe.json beside the entries."""

import json
import re
from pathlib import Path

from cache.core.errors import StoreError
from cache.core.layout import STORED

KIND = re.compile(r"[a-z0-9][a-z0-9_]*")


def check_recipe(store_path: Path, recipe: dict) -> None:
    """Raise StoreError with every problem of a recipe: its kind, its dtype and the shape of one item must be usable."""
    kind, dtype, shape = recipe.get("kind"), recipe.get("dtype"), recipe.get("shape")
    problems = []
    if not KIND.fullmatch(str(kind)):
        problems.append(f"kind = {kind!r}, expected lower-case letters, digits and _")
    if dtype not in list(STORED):
        problems.append(f"dtype = {dtype!r}, expected one of {', '.join(STORED)}")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        problems.append(f"shape = {shape!r}, expected a list of positive integers")
    if problems:
        raise StoreError(f"{store_path}: cannot use this recipe: {'; '.join(problems)}")


def recipe_text(recipe: dict) -> str:
    """The text of recipe.json."""
    return json.dumps(recipe, indent=2, sort_keys=True)
