"""Tasks without the ``luigi`` command: their list, and one run by several workers of Luigi, one for each device."""

import argparse
import os
import sys

from pipeline import stage_table
from pipeline.process.several import VISIBLE, numbers_in
from tasks import launch, manners, table


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__)
    parser.set_defaults(command=_list)
    commands = parser.add_subparsers(metavar="COMMAND")

    listed = commands.add_parser("list", help="the tasks, a line each; also where no command is given")
    listed.set_defaults(command=_list)

    run = commands.add_parser(
        "run",
        help="run a task and what it needs, on several devices",
        description="Runs a task and all that it needs. Ends with 0 once all of it is there, wherever it was made.",
        epilog="Without a scheduler in --scheduler-url or in Luigi's configuration, one is started for this run.",
    )
    run.add_argument("task", type=_task, metavar="TASK", help="as `python -m tasks list` has them")
    run.add_argument("--experiment", default="", metavar="FILE", help="TOML; without it, the embedded default")
    run.add_argument(
        "--devices",
        type=_devices,
        default=os.environ.get(VISIBLE),
        metavar="LIST",
        help=f"their numbers, as 0-7 or 0,2,3 (${VISIBLE})",
    )
    run.add_argument("--scheduler-url", default="", metavar="URL", help="of the luigid that all hosts share")
    run.set_defaults(command=_run)
    return parser


def _list(options) -> int:
    print(stage_table.described(with_groups=True))
    print("\nTo run one, with all that it needs:  luigi --module tasks TASK --experiment FILE")
    return 0


def _run(options) -> int:
    if not options.devices:
        sys.exit(f"error: --devices: name them, as 0-7, or set {VISIBLE}")
    return launch.launch(options.task, options.experiment, options.devices, options.scheduler_url)


def _task(name: str) -> str:
    if name not in table.TASKS:
        said = f"error: {manners.unknown(name, table.TASKS)}\ntasks:\n{stage_table.described(with_groups=True)}"
        print(said, file=sys.stderr)
        sys.exit(2)
    return name


def _devices(text: str) -> list[str]:
    try:
        return numbers_in(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
