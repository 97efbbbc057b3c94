"""How Luigi behaves here where the user's own configuration says nothing: exit codes, and a log one can read."""

import argparse
import difflib
import logging
import os
import sys
import tempfile

import luigi
from luigi.cmdline_parser import CmdlineParser
from luigi.rpc import RPCError
from luigi.task_register import Register

from cache import StoreError, printable
from pipeline.errors import UserError
from tasks.process import StageFailed

EXIT_CODES = {
    "already_running": 10,
    "missing_data": 20,
    "not_run": 25,
    "task_failed": 30,
    "scheduling_error": 35,
    "unhandled_exception": 40,
}
"""A script must see failure, and Luigi's own exit codes are all 0."""

DEFAULTS: dict[tuple[str, str], object] = {
    ("core", "log_level"): "INFO",
    # Luigi's own is one folder for all people of a host, and belongs to who came first.
    ("core", "lock_pid_dir"): os.path.join(tempfile.gettempdir(), f"luigi-{os.getuid()}"),
}
DEFAULTS |= {("retcode", name): code for name, code in EXIT_CODES.items()}

PREFIX = "[pid %s] Worker %s "
NOISE = ("Informed scheduler that task", "Worker Worker(", "Done scheduling tasks", "Running Worker with")
SAID_TWICE = "Luigi unexpected framework error while scheduling"
SILENT = "what was done is kept: start luigid there, or add --local-scheduler, and the same command goes on from there"


def apply() -> None:
    for (section, option), value in DEFAULTS.items():
        set_default(section, option, value)
    logging.getLogger("luigi-interface").addFilter(_Readable())


def describe(tasks: str) -> None:
    """Let ``luigi --module tasks --help`` end with what the tasks are, and a misspelt name say them too."""
    build = CmdlineParser._build_parser

    def with_tasks(*args, **kwargs):
        name, known = kwargs.get("root_task"), Register.task_names()
        if name and name not in known:  # Luigi itself ends with a traceback
            meant = "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(name, known, 1))
            sys.exit(f"error: there is no task {printable(name)}{meant}\ntasks:\n{tasks}")
        parser = build(*args, **kwargs)
        parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, f"tasks:\n{tasks}"
        return parser

    CmdlineParser._build_parser = staticmethod(with_tasks)  # type: ignore[method-assign]  # Luigi offers no other way


def set_default(section: str, option: str, value: object) -> None:
    """Set what the user's own configuration leaves open, in a TOML file as in Luigi's own format, which has texts."""
    if not luigi.configuration.get_config().has_option(section, option):
        set_always(section, option, value)


def set_always(section: str, option: str, value: object) -> None:
    """Set what the user's own configuration must not change."""
    config = luigi.configuration.get_config()
    is_text = isinstance(config, luigi.configuration.LuigiConfigParser)
    config.set(section, option, str(value) if is_text else value)


class _Readable(logging.Filter):
    """Which task runs and how it ended, without process ids, worker names and tracebacks of what a stage has said."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        if isinstance(error, RPCError) and str(record.msg).startswith(SAID_TWICE):
            return False
        if isinstance(error, StageFailed | UserError | StoreError | RPCError):
            record.msg, record.args = "%s", (f"{error}; {SILENT}" if isinstance(error, RPCError) else error,)
            record.exc_info = record.exc_text = None
        elif str(record.msg).startswith(PREFIX) and isinstance(record.args, tuple):
            record.msg, record.args = record.msg.removeprefix(PREFIX), record.args[2:]
        return record.levelno > logging.INFO or not str(record.msg).startswith(NOISE)
