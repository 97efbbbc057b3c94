"""The command that compares precisions, and the one that its processes run."""

import argparse
from pathlib import Path

from cache.terminal.arguments import above_zero
from cache.terminal.output import say_below, show
from pipeline.process import children, several
from pipeline.process.stopping import INTERRUPTED_EXIT
from pipeline.settings.reading import EXPERIMENT_HELP, load_experiment
from pipeline.settings.values import PRESETS
from pipeline.study import figures, report, study, subject

PART = "precision-part"


def add_to(commands) -> None:
    precision = commands.add_parser("precision", help="what an experiment's precision costs and saves, beside another")
    precision.add_argument("experiment", nargs="?", default="", metavar="EXPERIMENT", help=EXPERIMENT_HELP)
    against = f"the reference: {', '.join(PRESETS)} (fp32)"
    precision.add_argument("--against", default="fp32", choices=PRESETS, metavar="PRESET", help=against)
    precision.add_argument(
        "--items", type=above_zero, default=16, metavar="N", help="captions and photos looked at (16)"
    )
    precision.add_argument(
        "--devices", type=_devices, default=[], metavar="LIST", help="as 0-7 or 0,2,3: so many models compute at a time"
    )
    precision.add_argument("--json", action="store_true", help="for programs")
    precision.add_argument("--page", type=Path, metavar="FILE", help="HTML (RUNS/NAME-precision.html)")
    precision.set_defaults(command=_precision)


def add_part_to(commands) -> None:
    part = commands.add_parser(PART)
    part.add_argument("job", type=Path)
    part.add_argument("--parent", type=int, default=0)
    part.set_defaults(command=_precision_part)


def _devices(text: str) -> list[str]:
    try:
        return several.numbers_in(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _precision(options) -> None:
    experiment = load_experiment(options.experiment)
    try:
        found = study.study(options.experiment, options.against, options.items, options.devices)
    except KeyboardInterrupt:
        say_below("interrupted; nothing of it is kept")
        raise SystemExit(INTERRUPTED_EXIT) from None
    path = options.page or experiment.runs / f"{experiment.name}-precision.html"
    if found.has_page:
        found.report["page"] = str(path)
    if options.json:
        print(figures.as_json(found.report), flush=True)
    else:
        show(*report.parts(found.report))
    if found.has_page:
        from pipeline.study import page

        page.save(found, path)  # last: where the disk refuses it, the figures are there


def _precision_part(options) -> None:
    from pipeline.study import parts

    children.begin(options.parent)
    parts.compute(subject.Job.read(options.job))
