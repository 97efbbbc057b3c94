"""The stages one by one, and the tools around them."""

import argparse
import errno
import json
import os
import signal
import sys
from pathlib import Path

from cache import StoreError, print_anything
from cache.terminal.arguments import Parser, above_zero
from cache.terminal.output import bad, show
from pipeline import checks
from pipeline.devices import device
from pipeline.doctor import commands as doctor
from pipeline.errors import UserError
from pipeline.estimate import preflight, report
from pipeline.exchange import commands as exchange
from pipeline.methods import CONTROLNET, method_of
from pipeline.plan import data_report
from pipeline.plan.shard import WHOLE, Shard
from pipeline.process import children, launching, ranks, template
from pipeline.process.progress import say
from pipeline.process.stopping import INTERRUPTED_EXIT, STOPPED_EXIT, Stopped, end_with_parent
from pipeline.runs import listing
from pipeline.settings import described as settings
from pipeline.settings.reading import EXPERIMENT_HELP, load_experiment
from pipeline.stage_table import STAGES, described
from pipeline.stages import num_ranks, run, show_by_now
from pipeline.study import commands as study

INNER = study.PART, doctor.PART, "meet", "track", template.COMMAND


def main(arguments: list[str] | None = None) -> int:
    print_anything()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _inner_parser() if arguments and arguments[0] in INNER else _parser()
    options = parser.parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()  # here, where it can still be said that nobody reads on
        return status or 0
    except BrokenPipeError:  # the reader, such as head, has enough
        _close_stdout()
        return 1
    except (UserError, StoreError) as error:
        return _fail(str(error))
    except Stopped:
        say("stopped; what was finished is kept, the same command goes on from there", to_stderr=True)
        return STOPPED_EXIT
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT
    except OSError as error:
        name = error.filename or "the disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if not error.filename:
                _close_stdout()
            return _fail(f"{name}: {error.strerror}; make room, then run again")
        if error.errno is None:
            raise
        return _fail(f"{name}: {error.strerror}; check the disk and the permissions, then run again")


def _close_stdout() -> None:
    """Let Python say nothing of what it cannot print any more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    say(bad(f"error: {message}"), to_stderr=True)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pipeline", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    stage = commands.add_parser(
        "run",
        help="run one stage in this process",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"stages:\n{described(with_groups=False)}",
    )
    stage.add_argument("stage", choices=STAGES, metavar="STAGE", help="one of those below")
    stage.add_argument("--experiment", default="", metavar="FILE", help="TOML; without it, the embedded default")
    stage.add_argument(
        "--shard", type=_shard, default=WHOLE, metavar="I/N", help="of encoding or drawing: part I of N, counted from 0"
    )
    stage.add_argument("--survey", default="", help=argparse.SUPPRESS)  # the photos, as Luigi's process found them
    stage.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    stage.add_argument("--start-scheduler", action="store_true", help=argparse.SUPPRESS)
    stage.set_defaults(command=_run_stage)

    plan = commands.add_parser("plan", help="what an experiment has, lacks and takes, before any weight is read")
    plan.add_argument("experiment", nargs="?", default="", metavar="EXPERIMENT", help=EXPERIMENT_HELP)
    plan.add_argument(
        "--model-config", default="", metavar="DIR", help="configs alone: a folder, FLUX.1-dev or FLUX.1-schnell"
    )
    plan.add_argument("--controlnet", action="store_true", help="of the ControlNet's training instead of the LoRA's")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(command=_plan)

    data = commands.add_parser("data", help="what will happen to photos and captions: cut, enlarged, repeated")
    data.add_argument("experiment", nargs="?", default="", metavar="EXPERIMENT", help=EXPERIMENT_HELP)
    data.add_argument("--json", action="store_true", help="for programs; names up to 100 photos of each kind")
    data.set_defaults(command=_data)

    study.add_to(commands)
    doctor.add_to(commands)
    _add_runs(commands)
    _add_pictures(commands)
    _add_report(commands)
    exchange.add_to(commands)

    schema = commands.add_parser("schema", help="what an experiment file may say, as JSON Schema, for editors")
    schema.add_argument("--markdown", action="store_true", help="as a page to read instead, docs/experiment.md")
    schema.set_defaults(command=_schema)

    _add_tiny_model(commands)
    return parser


def _add_tiny_model(commands) -> None:
    tiny = commands.add_parser("tiny-model", help="write a tiny, untrained model in FLUX.1's format")
    tiny.add_argument("folder", type=Path, metavar="DIR")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.add_argument("--schnell", action="store_true", help="FLUX.1-schnell's format: without guidance embedding")
    tiny.add_argument(
        "--blocks",
        type=above_zero,
        nargs=2,
        default=(2, 2),
        metavar=("DOUBLE", "SINGLE"),
        help="of the transformer (2 2); FLUX.1 has 19 38",
    )
    tiny.add_argument("--width", type=_multiple_of_32, default=128, help="of the transformer (128); FLUX.1's is 3072")
    tiny.set_defaults(command=_write_tiny_model)


def _add_runs(commands) -> None:
    runs = commands.add_parser("runs", help="the runs in a folder: how far each came, in what they differ")
    place = "experiment file (*.toml), a folder of runs, or one run; without it, the runs of the embedded default"
    runs.add_argument("place", nargs="?", default="", metavar="EXPERIMENT|FOLDER", help=place)
    runs.add_argument("--json", action="store_true", help="with all settings")
    runs.set_defaults(command=_runs)


def _add_pictures(commands) -> None:
    pictures = commands.add_parser("pictures", help="what a training has drawn by now, decoded while it goes on")
    place = "experiment file (*.toml), or a run's folder"
    pictures.add_argument("place", metavar="EXPERIMENT|RUN", help=place)
    pictures.set_defaults(command=_pictures)


def _add_report(commands) -> None:
    report = commands.add_parser("report", help="a run on one HTML page, or several runs side by side")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, finished or not")
    report.add_argument("--out", type=Path, metavar="FILE", help="(RUN/report.html; of several, beside the first)")
    report.set_defaults(command=_report)


def _inner_parser() -> argparse.ArgumentParser:
    """Of commands that other commands start, and people do not."""
    parser = argparse.ArgumentParser(prog="python -m pipeline")
    commands = parser.add_subparsers(required=True)
    study.add_part_to(commands)
    doctor.add_part_to(commands)
    meet = commands.add_parser("meet")
    meet.add_argument("--parent", type=int, default=0)
    meet.set_defaults(command=_meet)
    track = commands.add_parser("track")
    track.add_argument("service")
    track.add_argument("run", type=Path)
    track.add_argument("first_step", type=int)
    track.set_defaults(command=_track)
    forked = commands.add_parser(template.COMMAND)
    forked.add_argument("socket", type=int)
    forked.add_argument("--parent", type=int, default=0)
    forked.set_defaults(command=_template)
    return parser


def _shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _multiple_of_32(text: str) -> int:
    if (number := above_zero(text)) % 32:
        raise argparse.ArgumentTypeError(f"must be a multiple of 32, the size of an attention head, found {text}")
    return number


def _run_stage(options) -> int:
    if ranks.is_scheduler():  # msrun starts the same command as its scheduler
        launching.meet()
        return 0
    children.begin(options.parent)
    experiment = load_experiment(options.experiment)
    count = num_ranks(options.stage, experiment)
    if count > 1 and not ranks.is_rank():
        return _run_ranks(options, count)
    if options.start_scheduler:
        launching.start_scheduler()
    run(options.stage, experiment, options.survey, options.shard)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads what it said any more; its work is done all the same
        _close_stdout()
    return 0


def _run_ranks(options, count: int) -> int:
    """The stage by several processes like this one, which has no more to do than to see that they end together."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = ["run", options.stage, "--experiment", options.experiment, "--survey", options.survey]
    handed_on = Path(options.survey).name  # /dev/fd/NUMBER, of a file without a name
    return launching.run(arguments, count, [int(handed_on)] if options.survey.startswith("/dev/fd/") else [])


def _meet(options) -> None:
    end_with_parent(options.parent, signal.SIGKILL)
    launching.meet()


def _template(options) -> int:
    children.begin(options.parent)
    return template.serve(options.socket, device.load_libraries, main)


def _track(options) -> int:
    from pipeline.training import trackers

    return trackers.follow(options.service, options.run, options.first_step)


def _plan(options) -> None:
    experiment = load_experiment(options.experiment)
    method = CONTROLNET if options.controlnet else method_of(experiment)
    found = preflight.of_experiment(experiment, method, options.model_config)
    if options.json:
        print(report.as_json(found, bool(options.model_config)))
    else:
        show(*report.parts(found))


def _data(options) -> int:
    experiment = load_experiment(options.experiment)
    found = checks.look_at_data(experiment)
    if options.json:
        print(data_report.as_json(found))
    else:
        show(*data_report.parts(found, experiment))
    refused = data_report.forbidden(found.findings, experiment)
    if not refused:
        return 0
    kinds = ", ".join(finding.kind for finding in refused)
    return _fail(f"{experiment.images}: [data] strict forbids {kinds}; mend it, or change strict")


def _write_tiny_model(options) -> None:
    from pipeline.devices import device
    from pipeline.flux import tiny

    device.use("CPU")
    folder = tiny.write_tiny_model(
        options.folder, options.seed, not options.schnell, tuple(options.blocks), options.width
    )
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    show(f"{folder}: {num_bytes / 1e6:.1f} MB; use it with [model] path = {os.fspath(folder.resolve())!r}")


def _runs(options) -> None:
    found = listing.find(options.place)
    if options.json:
        print(listing.as_json(found))
    else:
        show(*listing.as_lines(found))


def _pictures(options) -> None:
    from pipeline.report.run import read_run

    children.begin()
    folder = Path(options.place).expanduser()
    if not folder.is_dir():
        experiment = load_experiment(options.place)
        return show_by_now(experiment, method_of(experiment))
    known = read_run(folder)
    if known.experiment is None:
        raise UserError(f"{options.place}: its experiment.json cannot be read; name the experiment file instead")
    show_by_now(known.experiment, known.method, known.folder.path)


def _report(options) -> None:
    from pipeline.page.page import save
    from pipeline.report import page

    first = options.runs[0].expanduser()
    folder = first if len(options.runs) == 1 else first.resolve().parent
    out = options.out or folder / "report.html"
    save(out, page.report(options.runs))
    print(out)


def _schema(options) -> None:
    print(settings.as_markdown() if options.markdown else json.dumps(settings.json_schema(), indent=2) + "\n", end="")
