"""Checkpoints of a training: all that its next step depends on, so that a resumed run goes on bit for bit.

RUN/checkpoints/step-000500.safetensors    trained weights, optimizer moments, averages; in its metadata the step, the
                                           updates, the loss scale, what the run is, and a digest of the tensors
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache import canonical, digest, load_json, opened_tensors, write_tensors
from cache.core.files import make_folder
from pipeline.errors import NotFinite, UserError
from pipeline.plan.run_folder import RunFolder, step_of
from pipeline.process.progress import say
from pipeline.process.ranks import ALONE, Ranks

DIGEST_BYTES = 16
LENGTH = ("train.steps", "train.epochs")
AFTERWARDS = ("controlnet.save_dtype",)
"""What decides how a result is saved, and no step of the training."""
MAX_SHOWN = 80


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose digest holds.  ``counters``: the numbers beside the tensors, such as the loss scale."""

    path: Path
    step: int
    counters: dict
    identity: dict


class Damaged(UserError):
    """A checkpoint is not as it was written."""


def save(
    run: RunFolder, step: int, state: dict, counters: dict, identity: dict, keep: int, ranks: Ranks = ALONE
) -> None:
    """Write the checkpoint of ``step`` to the run's folder, then remove all but the newest ``keep``.

    state: parameters by name.  identity: what the run is, see `identity_of`.  Older checkpoints go once the new one is
    safe on disk.  Of several ranks all call it, and the first one writes.  Raises UserError where a number of the state
    is not finite, or the ranks' states differ: such a checkpoint is worth nothing.
    """
    make_folder(run.checkpoints)
    path = run.checkpoint(step)
    names = sorted(state)
    own = digest_of(step, state, counters, identity)
    ranks.check_equal(own, f"step {step}")
    if not ranks.is_first:
        return
    notes = {"step": step, "counters": counters, "identity": identity, "digest": own}
    tensors = {name: ("float32", tuple(state[name].shape)) for name in names}
    metadata = {key: json.dumps(value, sort_keys=True) for key, value in notes.items()}
    write_tensors(path, tensors, (_array(state[name]) for name in names), metadata)
    older = [each for each in run.list_checkpoints() if step_of(each) < step]  # others: of whoever wrote them
    for old in older[keep - 1 :]:
        old.unlink(missing_ok=True)


def newest(run: RunFolder, at_most: int) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole and not past step ``at_most``; says which ones are damaged.

    Raises UserError where one cannot be read: it may be whole, and to go on from the one before would lose its steps.
    """
    for path in run.list_checkpoints():
        if step_of(path) <= at_most:
            try:
                return _read(path)
            except Damaged as error:
                say(f"{error}; going back to the one before{_set_aside(path)}")
    return None


def _set_aside(path: Path) -> str:
    """Rename a damaged checkpoint, so that it is not taken for one again; what to say of it."""
    aside = path.with_name(f"{path.name}.damaged")
    with suppress(OSError):  # to read it again costs less than to end here
        path.replace(aside)
        return f", and keeping it as {aside.name}"
    return ""


def set_all_aside(run: RunFolder) -> None:
    """Rename all checkpoints of a run that must not be gone on from."""
    for path in run.list_checkpoints():
        _set_aside(path)


def find_shorter(run: RunFolder, identity: dict, at_most: int) -> Checkpoint | None:
    """The newest whole checkpoint of the runs beside ``run`` that differ from it in nothing but their length.

    at_most: the last step that it may be of.
    """
    others: list[Path] = []
    for other in run.others():
        with suppress(PermissionError):  # a colleague's, which this run can do without
            others += other.list_checkpoints()
    for path in sorted(others, key=step_of, reverse=True):
        if step_of(path) <= at_most:
            with suppress(UserError):
                if not differing(_notes(path).get("identity") or {}, identity, (*LENGTH, *AFTERWARDS)):
                    return _read(path)
    return None


def restore(checkpoint: Checkpoint, state: dict, elsewhere: Iterable[str] = ()) -> None:
    """Set the parameters of ``state`` to what the checkpoint holds.  Raises UserError where names or shapes differ.

    elsewhere: names of what the checkpoint holds too, for other ranks.
    """
    from mindspore import Tensor, ops

    with _opened(checkpoint.path) as file:
        names = set(file.keys()) - set(elsewhere)
        wrong = sorted(names ^ state.keys())
        wrong += [name for name in names & state.keys() if tuple(file.get_slice(name).get_shape()) != state[name].shape]
        if wrong:
            raise UserError(f"{checkpoint.path}: holds other tensors than this run trains: {', '.join(wrong[:5])}")
        for name, parameter in state.items():
            ops.assign(parameter, Tensor(file.get_tensor(name)))  # in place, see `Optimizer`


def check_identity(checkpoint: Checkpoint, identity: dict, ignored: Iterable[str] = ()) -> None:
    """Raise UserError that lists the fields in which the checkpoint is of another run."""
    if differences := differing(checkpoint.identity, identity, ignored):
        raise UserError("\n  ".join([f"{checkpoint.path}: is a checkpoint of another configuration", *differences]))


def differing(found: dict, wanted: dict, ignored: Iterable[str] = ()) -> list[str]:
    """The fields in which two identities differ, with both values."""
    keys = sorted((found.keys() | wanted.keys()) - set(ignored))
    return [
        f"{key}: {found.get(key, 'unset')} there, {wanted.get(key, 'unset')} here"
        for key in keys
        if found.get(key) != wanted.get(key)
    ]


def identity_of(decisive: dict) -> dict[str, str]:
    """All that decides a run's weights as short texts by dotted field; what is long stands as its digest."""
    flat: dict[str, str] = {}

    def add(name, value):
        if isinstance(value, dict) and value:
            for key in value:
                add(f"{name}.{key}" if name else key, value[key])
        else:
            text = canonical(value).decode()
            flat[name] = text if len(text) <= MAX_SHOWN else digest(text.encode())

    add("", decisive)
    return flat


def _read(path: Path) -> Checkpoint:
    """Raises Damaged, or UserError where the file cannot be read."""
    notes = _notes(path)
    with suppress(ValueError, KeyError, TypeError):
        with _opened(path) as file:
            claimed, hashed = notes.pop("digest"), _hasher(notes)
            for name in sorted(file.keys()):
                _add(hashed, name, file.get_tensor(name))
        if hashed.hexdigest() == claimed:
            return Checkpoint(path, int(notes["step"]), notes["counters"], notes["identity"])
    raise Damaged(f"{path}: the checkpoint is damaged")


def _notes(path: Path) -> dict:
    """What a checkpoint says of itself, unverified.  Raises as `_read` does."""
    try:
        with _opened(path) as file:
            return {key: load_json(text) for key, text in (file.metadata() or {}).items()}
    except ValueError as error:
        raise Damaged(f"{path}: the checkpoint is damaged") from error


@contextmanager
def _opened(path: Path) -> Iterator:
    """A checkpoint's file, to read tensors from.  Raises as `_read` does."""
    from safetensors import SafetensorError

    try:
        with opened_tensors(path) as file:
            yield file
    except SafetensorError as error:
        raise Damaged(f"{path}: the checkpoint is damaged") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; make it readable and run again, or remove it to go on "
            "from the one before"
        ) from error


def _hasher(notes: dict):
    return hashlib.blake2b(canonical(notes), digest_size=DIGEST_BYTES)


def digest_of(step: int, state: dict, counters: dict, identity: dict) -> str:
    """What a checkpoint says of all that is in it.  Raises UserError where a number of the state is not finite."""
    hashed = _hasher({"step": step, "counters": counters, "identity": identity})
    for name in sorted(state):
        array = _array(state[name])
        if not np.isfinite(array).all():
            raise NotFinite(
                f"step {step}: {name} is not finite any more, nothing was saved; lower train.learning_rate, or use a "
                "wider precision"
            )
        _add(hashed, name, array)
    return hashed.hexdigest()


def _add(hashed, name: str, array: np.ndarray) -> None:
    hashed.update(name.encode())
    hashed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _array(parameter) -> np.ndarray:
    return np.ascontiguousarray(parameter.asnumpy())
