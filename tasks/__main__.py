"""Several workers of Luigi on this host, one for each device, which take what is to be done from one scheduler."""

import argparse
import os
import sys

from tasks import launch, table
from tasks.launch import DEVICES


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a task and what it needs, on several devices",
        description="Runs a task and all that it needs. Ends with 0 once all of it is there, wherever it was made.",
        epilog="Without a scheduler in --scheduler-url or in Luigi's configuration, one is started for this run.",
    )
    run.add_argument("task", choices=table.TASKS, metavar="TASK", help="as `luigi --module tasks --help` lists them")
    run.add_argument("--experiment", default="", metavar="FILE", help="TOML; without it, the embedded default")
    run.add_argument(
        "--devices",
        type=_devices,
        default=os.environ.get(DEVICES),
        metavar="LIST",
        help=f"their numbers, as 0-7 or 0,2,3 (${DEVICES})",
    )
    run.add_argument("--scheduler-url", default="", metavar="URL", help="of the luigid that all hosts share")
    run.set_defaults(command=_run)
    return parser


def _run(options) -> int:
    if not options.devices:
        sys.exit(f"error: --devices: name them, as 0-7, or set {DEVICES}")
    return launch.launch(options.task, options.experiment, options.devices, options.scheduler_url)


def _devices(text: str) -> list[str]:
    try:
        return launch.devices(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
