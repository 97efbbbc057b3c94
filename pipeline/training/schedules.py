"""The learning rate as a function of the step, by the names and formulas of diffusers' ``get_scheduler``.

Nothing here has a state: a run that is interrupted and resumed has the same rate at the same step.  Formulas:
``src/diffusers/optimization.py`` of diffusers, where each is a factor on the optimizer's own rate.
"""

import math
from dataclasses import dataclass

from pipeline.settings.values import LR_END

COSINE_CYCLES, RESTARTS = 0.5, 1
"""How often ``cosine`` goes down and up again (half: only down), and how often ``cosine_with_restarts`` starts."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every optimizer step of one run.

    name: one of NAMES.  base: the highest rate, which warm-up ends at; ``constant`` has no warm-up.
    warmup_steps: the rate grows from 0 at step 0, linearly, to ``base`` at this step.
    total_steps: the run's last step is ``total_steps - 1``.
    num_cycles: for the two cosines; 0: as diffusers has it, COSINE_CYCLES or RESTARTS.  There, a user's ``num_cycles``
    reaches ``cosine_with_restarts`` only; here, both.  power: of ``polynomial``.
    Raises ValueError for another name, and for a polynomial whose ``base`` is not above LR_END.
    """

    name: str
    base: float
    warmup_steps: int
    total_steps: int
    num_cycles: float = 0.0
    power: float = 1.0

    def __post_init__(self):
        depends_on_total(self.name)
        if self.name == "polynomial" and self.base <= LR_END:
            raise ValueError(f"polynomial ends at {LR_END}: the learning rate must be above it, found {self.base}")

    def at(self, step: int) -> float:
        """The rate that optimizer step ``step``, counted from 0, uses.

        From ``total_steps`` on, ``linear`` and ``cosine_with_restarts`` stay at 0 and ``polynomial`` at LR_END, but
        ``cosine`` goes on along its curve, up again.
        """
        if self.name == "constant":
            return self.base
        if step < self.warmup_steps:
            return self.base * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.base * CURVES[self.name](self, progress)


def depends_on_total(name: str) -> bool:
    """Whether the rate of a step depends on how long the run is; where not, a finished run can be continued.

    Raises ValueError for a name that is not in NAMES.
    """
    if name not in NAMES:
        raise ValueError(f"learning rate schedule {name!r}: must be one of {', '.join(NAMES)}")
    return name not in ("constant", "constant_with_warmup")


def _flat(schedule: Schedule, progress: float) -> float:
    return 1.0


def _linear(schedule: Schedule, progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(schedule: Schedule, progress: float) -> float:
    cycles = schedule.num_cycles or COSINE_CYCLES
    return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress)))


def _cosine_with_restarts(schedule: Schedule, progress: float) -> float:
    if progress >= 1.0:
        return 0.0
    cycles = schedule.num_cycles or RESTARTS
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (cycles * progress % 1.0))))


def _polynomial(schedule: Schedule, progress: float) -> float:
    end = LR_END / schedule.base
    return (1.0 - end) * max(0.0, 1.0 - progress) ** schedule.power + end


CURVES = {
    "constant": _flat,
    "constant_with_warmup": _flat,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}
"""The factor on ``base`` after the warm-up; progress: 0 at the warm-up's end, 1 at ``total_steps``."""

NAMES = tuple(CURVES)
