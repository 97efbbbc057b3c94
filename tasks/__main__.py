"""Tasks without the ``luigi`` command: their list, one run by a worker for each device, and sweeps of settings."""

import argparse
import os
import sys

from cache.terminal.arguments import USAGE_EXIT, Parser, fail, unknown
from cache.terminal.output import bad, say
from pipeline import stage_table
from pipeline.process.several import VISIBLE, numbers_in
from tasks import launch, sweep_command, table

WITH = "another setting that changes with the --set before it: as many values"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m tasks", description=__doc__)
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
    _add_sweep(commands)
    return parser


def _add_sweep(commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train with every combination of some settings' values, and compare",
        description="Writes an experiment file for each combination to NAME-sweep/, encodes once what they share, "
        "trains each, and ends with a table and a page that compare them. What is done already is not run again.",
        epilog="A value is TOML; a text needs no quotes. For two settings that change together: --set lora.rank=4,16 "
        "--with lora.alpha=4,16",
    )
    sweep.add_argument("experiment", nargs="?", default="", metavar="FILE", help="TOML; without it, the default")
    for option, what in (("--set", "a setting and its values; again for another one"), ("--with", WITH)):
        sweep.add_argument(option, dest="words", action=sweep_command.Words, metavar="NAME=VALUE,...", help=what)
    sweep.add_argument(
        "--task",
        action="append",
        choices=sweep_command.OF_RUNS,
        metavar="TASK",
        help="what is run of each, as MeasureLoss; may be given again (pictures, where [sample] asks for some, else "
        "the training)",
    )
    sweep.add_argument("--dry-run", action="store_true", help="list the combinations and what of them is done")
    sweep.add_argument(
        "--devices",
        type=_devices,
        default=os.environ.get(VISIBLE),
        metavar="LIST",
        help="as 0-7: so many train at a time",
    )
    sweep.add_argument("--scheduler-url", default="", metavar="URL", help="of a luigid")
    sweep.set_defaults(command=sweep_command.sweep)


def _list(options) -> int:
    print(stage_table.described(with_groups=True))
    print("\nTo run one, with all that it needs:  luigi --module tasks TASK --experiment FILE")
    return 0


def _run(options) -> int:
    if not options.devices:
        fail(f"--devices: name them, as 0-7, or set {VISIBLE}")
    return launch.launch(options.task, options.experiment, options.devices, options.scheduler_url)


def _task(name: str) -> str:
    if name not in table.TASKS:
        said = bad(f"error: {unknown(name, table.TASKS)}"), f"tasks:\n{stage_table.described(with_groups=True)}"
        say(*said, to_stderr=True)
        sys.exit(USAGE_EXIT)
    return name


def _devices(text: str) -> list[str]:
    try:
        return numbers_in(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
