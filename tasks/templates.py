"""The template that the processes of this one's stages are forks of."""

import functools
import multiprocessing

from pipeline.plan.plan import device_and_precision
from pipeline.process.template import Template
from pipeline.settings.experiment import Experiment


def of(experiment: Experiment) -> Template | None:
    """On CPU, the one of this process, which is started by the first call; None for one of several workers of Luigi's,
    each of which is a process for a single task."""
    target, _ = device_and_precision(experiment)
    return _own() if target == "CPU" and not multiprocessing.parent_process() else None


@functools.cache
def _own() -> Template:
    return Template()
