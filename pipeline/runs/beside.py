"""Why a training does not go on from the runs beside it: what differs from the one that is most like it."""

from contextlib import suppress
from dataclasses import dataclass

from cache import StoreError
from cache.terminal.places import shown
from pipeline.runs.differences import short_name
from pipeline.runs.reading import Run, RunFolder, identity_in, photos_in, read_run

LENGTH = "train.steps", "train.epochs"
MOST_DIFFERENCES = 4
WORDS = (
    ("data.samples", "captions or sizes of the photos"),
    ("entries.latents", "how photos are encoded"),
    ("entries.", "how captions are encoded"),
    ("controls.", "conditions"),
    ("prior.pictures", "the pictures of [prior]"),
    ("transformer.", "the pretrained transformer"),
    ("vae.", "the pretrained VAE"),
    ("scheduler.", "the model's noise schedule"),
)
"""What fields of an identity are called that no setting names, by how they begin."""


@dataclass(frozen=True)
class _Other:
    """A run beside the one that begins.  identity: what decides its weights; keys: where the two differ."""

    run: Run
    identity: dict[str, str]
    keys: list[str]


def why_anew(run: RunFolder, identity: dict[str, str]) -> str:
    """In one line, what differs between a run that begins and the one of its name that is most like it.

    identity: what decides the run's weights, by dotted field.  Empty where no other of its name can be read.
    """
    others = _others(run, identity)
    if not others:
        return ""
    nearest = min(others, key=lambda other: (len(other.keys), -other.run.when))
    place = shown(nearest.run.path)
    if set(nearest.keys) <= set(LENGTH):
        return f"starts anew: {place} has no checkpoint of so few steps, its newest is of {nearest.run.checkpoint}"
    found = _told(nearest, run, identity)
    more = f"; and {len(found) - MOST_DIFFERENCES} more" if len(found) > MOST_DIFFERENCES else ""
    what = "; ".join(found[:MOST_DIFFERENCES]) + more
    return f"starts anew: more than the number of steps differs from {place}: {what}"


def _others(run: RunFolder, identity: dict[str, str]) -> list[_Other]:
    name, found = read_run(run.path).name, []
    for folder in run.others():
        with suppress(OSError):  # a colleague's
            other, theirs = read_run(folder.path), identity_in(folder)
            if other.name == name and theirs:
                found.append(_Other(other, theirs, _differing(theirs, identity)))
    return found


def _differing(theirs: dict[str, str], ours: dict[str, str]) -> list[str]:
    keys = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    return [key for key in keys if not (key == "mode" and "train.mode" in keys)]


def _told(other: _Other, run: RunFolder, identity: dict[str, str]) -> list[str]:
    """The differences for people, each kind once, the photos first."""
    found = []
    with suppress(OSError, StoreError):
        before, now = photos_in(other.run.folder), photos_in(run)
        found += [_photos(before, now)] if before != now else []
    for key in other.keys:
        words = next((words for start, words in WORDS if key.startswith(start)), "")
        if not (key == "data.samples" and found):  # else they are other photos
            values = f"{other.identity.get(key, 'unset')} there, {identity.get(key, 'unset')} here"
            found.append(words or f"{short_name(key)} {values}")
    return list(dict.fromkeys(found))


def _photos(before: frozenset[str], now: frozenset[str]) -> str:
    changes = ((len(now - before), "added"), (len(before - now), "removed"))
    words = " and ".join(f"{count:,} {word}" for count, word in changes if count)
    return f"{len(before):,} photos there, {len(now):,} here ({words})"
