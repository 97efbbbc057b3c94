"""What to change in an experiment file where a stage takes more memory than one device has."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.estimate.subject import Subject


@dataclass(frozen=True)
class Knob:
    """A setting that saves memory.  ``lower(subject)``: values to try, each of which takes less than the one before."""

    table: str
    name: str
    lower: Callable[[Subject], Iterable]

    def turned(self, subject: Subject, value) -> Subject:
        table = dataclasses.replace(getattr(subject.experiment, self.table), **{self.name: value})
        return dataclasses.replace(subject, experiment=dataclasses.replace(subject.experiment, **{self.table: table}))

    def words(self, value) -> str:
        return f"[{self.table}] {self.name} = {json.dumps(value)}"


class Advice(TypedDict):
    """Settings to change.  peak_bytes: what the stage then takes; fits: whether that is little enough."""

    settings: list[str]
    peak_bytes: int
    fits: bool


class Verdict(TypedDict):
    """Whether a stage fits one device, which has ``memory_bytes``; advice: what to change where it does not."""

    memory_bytes: int
    fits: bool
    advice: Advice | None


def verdict(subject: Subject, peak_bytes: int, knobs: Sequence[Knob], peak_of: Callable[[Subject], int]) -> Verdict:
    """Whether a stage fits one device, and, where it does not, which settings make it fit.

    knobs: in the order in which they are turned, each only as far as it takes.
    """
    fits = peak_bytes <= subject.memory_bytes
    advice = None if fits else _advice(subject, peak_bytes, knobs, peak_of)
    return {"memory_bytes": subject.memory_bytes, "fits": fits, "advice": advice}


def _advice(subject: Subject, peak_bytes: int, knobs: Sequence[Knob], peak_of: Callable[[Subject], int]) -> Advice:
    settings: list[str] = []
    for knob in knobs:
        least = None
        for value in knob.lower(subject):
            least = value
            if peak_of(knob.turned(subject, value)) <= subject.memory_bytes:
                break
        if least is None or (peak := peak_of(knob.turned(subject, least))) >= peak_bytes:
            continue
        subject, peak_bytes = knob.turned(subject, least), peak
        settings.append(knob.words(least))
        if peak_bytes <= subject.memory_bytes:
            break
    return {"settings": settings, "peak_bytes": peak_bytes, "fits": peak_bytes <= subject.memory_bytes}


# --- the knobs ----------------------------------------------------------------------------------------------------


def _halved(number: int) -> list[int]:
    return [number >> shift for shift in range(1, number.bit_length())]


def _lengths(subject: Subject) -> list[int]:
    """Fewer tokens than 64 cut off most captions."""
    return [length for length in _halved(subject.experiment.data.max_sequence_length) if length >= 64]


def _eighths_less(pixels: int) -> range:
    """Down to a quarter of so many pixels, about an eighth of them at a time, in multiples of 16."""
    step = max(16, pixels // 8 // 16 * 16)
    return range((pixels - 1) // step * step, pixels // 4 - 1, -step)


def _half_preset(subject: Subject) -> list[str]:
    """The preset in the first half precision that the device computes, unless the experiment's is one or forbids it."""
    half = next(dtype for dtype in device.COMPUTES[subject.target] if dtype != "fp32")
    try:
        return [half] if PRESET.turned(subject, half).policies != subject.policies else []
    except UserError:  # a table of [precision] does not fit it
        return []


def _resolutions(subject: Subject) -> list[int | tuple]:
    own = subject.experiment.data.resolution
    if isinstance(own, int):
        return list(_eighths_less(own))
    return [tuple(sorted({min(each, limit) for each in own})) for limit in _eighths_less(max(own))]


def of_method(subject: Subject) -> list[Knob]:
    """The knobs that the method itself has."""
    values: dict[tuple[str, str], list] = {}
    for saving in subject.method.savings(subject.experiment, subject.config(subject.family.network)):
        values.setdefault((saving.table, saving.name), []).append(saving.value)
    return [Knob(table, name, _always(several)) for (table, name), several in values.items()]


def _always(values: list) -> Callable[[Subject], list]:
    return lambda subject: values


PRESET = Knob("precision", "preset", _half_preset)
CHECKPOINTING = Knob("train", "gradient_checkpointing", lambda subject: [True])
BATCH = Knob("train", "batch_size", lambda subject: _halved(subject.experiment.train.batch_size))
LENGTH = Knob("data", "max_sequence_length", _lengths)
RESOLUTION = Knob("data", "resolution", _resolutions)
PRIOR_BATCH = Knob("prior", "batch_size", lambda subject: _halved(subject.experiment.prior.batch_size))
SAMPLE_BATCH = Knob("sample", "batch_size", lambda subject: _halved(subject.experiment.sample.batch_size))
SAMPLE_RESOLUTION = Knob("sample", "resolution", lambda subject: _eighths_less(subject.experiment.sample_resolution))
