"""The plots of one training, or of several on one axis."""

from collections.abc import Mapping

import numpy as np

from pipeline.draws import Purpose
from pipeline.errors import UserError
from pipeline.flux import pretrained
from pipeline.page.plots import Line, Plot, decimated, smoothed
from pipeline.plan.families import family_of
from pipeline.report.metrics import Metrics
from pipeline.report.run import Run
from pipeline.training.weighting import drawn_levels

HALF_LIVES = 20
"""Into how many half-lives of the smoothed loss a training is divided, at most; one is 3 lines or more."""

NUM_LEVELS = 10
"""Into how many parts the noise levels from 0 to 1 are divided."""

MOST_ERROR = 0.25
"""The standard error of a level's loss beyond which it is left out, as a share of the mean loss."""

LINES_A_LEVEL = 8
"""How many lines of metrics.jsonl there have to be for each part in each half of the training."""


def of_run(run: Run) -> list[Plot]:
    """All curves of one run that there are numbers for."""
    metrics = run.metrics
    if not len(metrics.steps):
        return []
    plots = [
        Plot("loss", "Loss", loss_lines(metrics), note="Faint: each logged step. Strong: their moving average."),
        *loss_by_level({run.name: run}),
        _plain(metrics, "lr", "Learning rate"),
        _plain(metrics, "grad_norm", "Gradient norm, before clipping", log_y=None),
        _plain(metrics, "step_seconds", "Seconds a step", log_y=None),
    ]
    return [plot for plot in plots if plot.lines]


def of_several(runs: Mapping[str, Run]) -> list[Plot]:
    """The curves of several runs, by label, each run in a colour of its own."""
    known = {label: run for label, run in runs.items() if len(run.metrics.steps)}
    colours = {label: place for place, label in enumerate(runs)}
    life = max((half_life(run.metrics) for run in known.values()), default=1.0)  # one for all, to be compared
    each = [
        line for label, run in known.items() for line in _averaged(label, run.metrics, "loss", colours[label], life)
    ]
    several: list[Plot] = [Plot("loss", "Loss, moving average", each), *loss_by_level(known, colours)]
    for column, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm, moving average, before clipping")):
        lines = [
            line for label, run in known.items() for line in _column(label, run.metrics, column, colours[label], life)
        ]
        several.append(Plot(column, title, lines, log_y=None))
    return [plot for plot in several if plot.lines]


def half_life(metrics: Metrics) -> float:
    return max(3.0, len(metrics.steps) / HALF_LIVES)


def loss_lines(metrics: Metrics) -> list[Line]:
    """Raw and smoothed, at the same places."""
    loss = metrics["loss"]
    places = decimated(loss)
    steps = metrics.steps[places]
    average = smoothed(loss, half_life(metrics))[places]
    return [Line("loss", steps, loss[places], "faint"), Line("moving average", steps, average)]


def _column(label: str, metrics: Metrics, column: str, colour: int, life: float) -> list[Line]:
    if column == "lr":
        places = decimated(metrics[column])
        return [Line(label, metrics.steps[places], metrics[column][places], colour=colour)] if len(places) else []
    return _averaged(label, metrics, column, colour, life)


def _averaged(label: str, metrics: Metrics, column: str, colour: int, life: float) -> list[Line]:
    average = smoothed(metrics[column], life)
    places = decimated(average)
    return [Line(label, metrics.steps[places], average[places], colour=colour)] if len(places) else []


def _plain(metrics: Metrics, column: str, title: str, log_y: bool | None = False) -> Plot:
    places = decimated(metrics[column])
    lines = [Line(title.partition(",")[0].lower(), metrics.steps[places], metrics[column][places])]
    return Plot(column, title, lines if len(places) else [], log_y=log_y)


# --- loss by noise level ------------------------------------------------------------------------------------------


def loss_by_level(runs: Mapping[str, Run], colours: Mapping[str, int] | None = None) -> list[Plot]:
    """One plot: of one run in the first and in the second half of its training, of several in the second half."""
    lines = []
    for label, run in runs.items():
        try:
            halves = _halves(run)
        except (UserError, OSError, ValueError) as error:
            run.missing.append(f"Loss by noise level: {error}")
            continue
        if not halves:
            needed = 2 * LINES_A_LEVEL * NUM_LEVELS
            run.missing.append(f"Loss by noise level: {needed} lines of metrics.jsonl or more show it")
        elif colours is None:
            first, second = halves
            lines += [Line("first half", *first, "dashed", 1), Line("second half", *second, "dots", 0)]
        else:
            lines.append(Line(label, *halves[1], "dots", colours[label]))
    note = "0: no noise, 1: noise alone. Losses as the training weighs them."
    which = "" if colours is None else ", second half of each training"
    return [Plot("levels", f"Loss by noise level{which}", lines, "noise level", "number", note=note)] if lines else []


def _halves(run: Run) -> list[tuple[np.ndarray, np.ndarray]]:
    """The centres of the levels and the losses there, of both halves of the lines; none where there are too few."""
    steps, losses = run.metrics.steps, run.metrics["loss"]
    if run.experiment is None:
        raise UserError("which levels a step drew is not known without its settings")
    if len(steps) < 2 * LINES_A_LEVEL * NUM_LEVELS:
        return []
    shares = _shares(run, steps)
    middle = len(steps) // 2
    return [_fitted(shares[part], losses[part]) for part in (slice(0, middle), slice(middle, None))]


def _shares(run: Run, steps: np.ndarray) -> np.ndarray:
    """(steps, NUM_LEVELS): of each step, which share of its items was drawn in each part of the noise levels.

    The draws come from counters, so that those of any step can be had again.  With a prior its items are added, by its
    weight, as they are to the loss: both are taken to have the same loss at a level.
    """
    assert run.experiment is not None
    model, train = run.experiment.model, run.experiment.train
    folder = pretrained.local_folder(run.experiment.model_path, model.revision, model.variant)
    sigmas = family_of(folder).training_sigmas(folder)
    part_of = np.minimum((sigmas * NUM_LEVELS).astype(int), NUM_LEVELS - 1)
    groups = [(Purpose.SIGMA, 1.0)]
    groups += [(Purpose.PRIOR_SIGMA, run.experiment.prior.weight)] if run.experiment.has_prior else []
    shares = np.zeros((len(steps), NUM_LEVELS))
    for row, step in enumerate(steps):
        for batch in range((int(step) - 1) * train.accumulate, int(step) * train.accumulate):
            for purpose, weight in groups:
                drawn = part_of[drawn_levels(train, run.experiment.seed, batch, len(sigmas), purpose)]
                shares[row] += weight * np.bincount(drawn, minlength=NUM_LEVELS)
    return shares / (train.accumulate * train.batch_size)


def _fitted(shares: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each part of the levels: by least squares, as a step's loss is the mean of its items' losses.

    With one item a step that is the mean over the steps of each part.  Parts that were drawn so seldom that nothing can
    be said of their loss are left out.
    """
    known = np.isfinite(losses)
    shares, losses = shares[known], losses[known]
    drawn = np.flatnonzero(shares.any(axis=0))
    found, *_ = np.linalg.lstsq(shares[:, drawn], losses, rcond=None)
    variance = ((losses - shares[:, drawn] @ found) ** 2).sum() / max(1, len(losses) - len(drawn))
    error = np.sqrt(variance * np.diag(np.linalg.pinv(shares[:, drawn].T @ shares[:, drawn])))
    is_certain = (error <= MOST_ERROR * losses.mean()) & (shares[:, drawn].sum(axis=0) >= 1)
    return ((drawn + 0.5) / NUM_LEVELS)[is_certain], found[is_certain]
