"""The tensors of safetensors files put into a model, without a copy where they are in the model's dtype already.

A file is mapped privately: its pages are read when they are first used, several processes share them, and what is
written to a parameter stays in this process.  The format: https://github.com/huggingface/safetensors, "Format".
"""

import json
import mmap
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from cache import opened_tensors
from cache.core.files import named
from pipeline.errors import UserError
from pipeline.flux.pretrained import one_line

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {"fp32": DTYPES["F32"], "fp16": DTYPES["F16"], "bf16": DTYPES["BF16"]}
MINDSPORE_NAMES = {"Float32": "fp32", "Float16": "fp16", "BFloat16": "bf16"}
PYTORCH_NAMES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
"""What MindSpore's layers call their parameters, and what FLUX.1's files call them."""


def name_in_file(parameter: str) -> str:
    stem, dot, last = parameter.rpartition(".")
    return stem + dot + PYTORCH_NAMES.get(last, last)


def fill(model, part: Path, files: Iterable[Path], renamed: Callable[[dict], dict] = dict) -> None:
    """Give every parameter of ``model``, which may be uninitialised, its value from ``files``, in its own dtype.

    renamed: gives the tensors of a file the names that diffusers has for them.

    Raises UserError that lists every weight that is missing, unexpected, or of a wrong shape or dtype; ``part`` is the
    folder that it names.
    """
    wanted = {name_in_file(parameter.name): parameter for parameter in model.get_parameters()}
    found: dict[str, np.ndarray] = {}
    for path in files:
        arrays = renamed(mapped(path))
        if twice := sorted(found.keys() & arrays.keys()):
            raise UserError(f"{path}: has {twice[0]}, which another shard has too; fetch the model again")
        found |= arrays
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = {name: array for name, array in found.items() if not any(re.search(each, name) for each in ignored)}
    if problems := _problems(wanted, found):
        raise UserError("\n  ".join([f"{part}: weights do not fit the config ({len(problems)} problems)", *problems]))
    for name, parameter in wanted.items():
        set_value(parameter, found.pop(name))


def set_value(parameter, array: np.ndarray) -> None:
    """Make ``array``, in the parameter's dtype, its value; the memory is shared where the array has that dtype."""
    import mindspore as ms

    dtype = NAMES[MINDSPORE_NAMES[str(parameter.dtype)]]
    parameter.set_data(ms.Tensor.from_numpy(np.ascontiguousarray(array.astype(dtype, copy=False))))


def mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name, each a view of a private mapping of it.

    Raises UserError where the file is damaged, or has tensors of other dtypes than float32, float16 and bfloat16.
    """
    header, begin = _header(path)
    with named(path), open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)
    if other := sorted(name for name, each in header.items() if each["dtype"] not in DTYPES):
        kind = header[other[0]]["dtype"]
        raise UserError(f"{path}: {other[0]} is {kind}, expected {', '.join(DTYPES)}; convert the model")
    return {name: _view(memory, begin, **entry) for name, entry in header.items()}


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself.  Raises UserError where it is damaged."""
    return dict(_header(path)[0].get("__metadata__") or {})


def _header(path: Path) -> tuple[dict, int]:
    """The table of a safetensors file, and where its tensors begin."""
    check_header(path)
    with named(path), open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        return json.loads(file.read(begin - 8)), begin


def _view(memory: mmap.mmap, begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    first, last = data_offsets
    return np.ndarray(shape, DTYPES[dtype], memory, begin + first) if last > first else np.empty(shape, DTYPES[dtype])


def check_header(path: Path) -> None:
    """Raise UserError where a safetensors file cannot be read, is none, or is not as long as its header says."""
    from safetensors import SafetensorError

    try:
        with opened_tensors(path):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the disk and the permissions") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({one_line(error)}); fetch it again") from None


def _problems(wanted: dict, found: dict[str, np.ndarray]) -> list[str]:
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    return [
        *(f"missing weight {name}" for name in sorted(wanted.keys() - found.keys())),
        *(f"unexpected weight {name}" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"weight {name}: shape {found[name].shape} in the file, {shapes[name]} by the config"
            for name in sorted(wanted.keys() & found.keys())
            if found[name].shape != shapes[name]
        ),
    ]
