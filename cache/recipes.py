"""What a recipe must say for its entries to be stored."""

import re

from .errors import StoreError
from .segment import STORED

KIND = re.compile(r"[a-z0-9][a-z0-9_]*")


def check_recipe(store_path, recipe):
    """Raises StoreError that names every problem of a recipe."""
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
