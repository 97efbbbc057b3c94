"""How Luigi behaves here where the user's own configuration says nothing: exit codes, and a log one can read."""

import argparse
import functools
import logging
import os
import sys
import tempfile
from typing import Any, NoReturn

import luigi
from luigi.cmdline_parser import CmdlineParser
from luigi.rpc import RemoteScheduler, RPCError
from luigi.scheduler import FAILED
from luigi.task_register import Register

from cache import StoreError
from cache.terminal.arguments import refuse, unknown
from cache.terminal.output import bad, is_terminal, num_columns, say, wrapped
from pipeline.errors import UserError
from tasks import endings
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

ASKS = {"--help", "--help-all"}

ONLY_ONCE = 1
"""Of a task's tries, once it is known that more of them would be in vain."""

PREFIX = "[pid %s] Worker %s "
NOISE = ("Informed scheduler that task", "Worker Worker(", "Done scheduling tasks", "Running Worker with")
OF_A_TASK = "running ", "done "
SAID_TWICE = "Luigi unexpected framework error while scheduling"
SILENT = "what was done is kept: start luigid there, or add --local-scheduler, and the same command goes on from there"


def apply() -> None:
    for (section, option), value in DEFAULTS.items():
        set_default(section, option, value)
    logging.getLogger("luigi-interface").addFilter(_Readable())


def describe(tasks: str) -> None:
    """Let ``luigi --module tasks --help`` end with what the tasks are, and a misspelt name say them too."""
    build = CmdlineParser._build_parser

    @functools.cache  # Luigi builds each of two parsers three times
    def built(known: tuple[str, ...], *args, **kwargs):
        """known: so that there is a new one where another task is registered."""
        return build(*args, **kwargs)

    def with_tasks(*args, **kwargs):
        name, known = kwargs.get("root_task"), Register.task_names()
        if name and name not in known:  # Luigi itself ends with a traceback
            _end(unknown(name, known), tasks)
        if "root_task" in kwargs and not name and not ASKS.intersection(sys.argv):
            _end("no task is named", tasks)
        parser = built(tuple(known), *args, **kwargs)
        parser.error = lambda message: _refuse(parser, message)
        parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, f"tasks:\n{tasks}"
        return parser

    CmdlineParser._build_parser = staticmethod(with_tasks)  # type: ignore[method-assign]  # Luigi offers no other way


def _end(message: str, tasks: str) -> NoReturn:
    say(bad(f"error: {message}"), f"tasks:\n{tasks}", to_stderr=True)
    raise SystemExit(1)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """As argparse, with what an unknown option was meant to be; without a usage that has Luigi's own options."""
    name = next((word for word in message.split() if word.startswith("--")), "")
    is_unknown = message.startswith("unrecognized arguments") and name
    said = unknown(name.partition("=")[0], parser._option_string_actions, "option") if is_unknown else message
    refuse(said, "luigi --module tasks")


def set_default(section: str, option: str, value: object) -> None:
    """Set what the user's own configuration leaves open, in a TOML file as in Luigi's own format, which has texts."""
    if not luigi.configuration.get_config().has_option(section, option):
        set_always(section, option, value)


def set_always(section: str, option: str, value: object) -> None:
    """Set what the user's own configuration must not change."""
    config = luigi.configuration.get_config()
    is_text = isinstance(config, luigi.configuration.LuigiConfigParser)
    config.set(section, option, str(value) if is_text else value)


def give_up_where_told() -> None:
    """Let the scheduler not try again what has failed with ONLY_ONCE as its task's number of tries.

    It counts a failure by what it was told before, so it is told twice.
    """
    remote: Any = RemoteScheduler  # Luigi makes its methods when it is imported, and offers no other way to change one
    add_task = remote.add_task

    def told_twice(scheduler, **task):
        if task.get("status") == FAILED and (task.get("retry_policy_dict") or {}).get("retry_count") == ONLY_ONCE:
            add_task(scheduler, **task)
        return add_task(scheduler, **task)

    remote.add_task = told_twice


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
        is_shown = record.levelno > logging.INFO or not self._is_noise(str(record.msg), record.args)
        if is_shown and is_terminal(sys.stderr):
            record.msg, record.args = "%s", (_wrapped(record),)
        return is_shown

    def _is_noise(self, message: str, args: object) -> bool:
        """Also of a group of tasks, which does nothing itself; and Luigi's summary, where `endings` has said it."""
        is_of_group = isinstance(args, tuple) and bool(args) and isinstance(args[0], luigi.WrapperTask)
        is_told = message.startswith(endings.SUMMARY) and endings.is_ours()
        return message.startswith(NOISE) or (message.startswith(OF_A_TASK) and is_of_group) or is_told


def _wrapped(record: logging.LogRecord) -> str:
    """The message of a line of log in lines that a terminal has room for, below the name of its level."""
    said = f"{record.levelname}: {record.getMessage()}"
    several = [part for line in said.split("\n") for part in wrapped(line, num_columns(sys.stderr))]
    return "\n".join(several).removeprefix(f"{record.levelname}: ")
