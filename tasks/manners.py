"""How Luigi behaves here where the user's own configuration says nothing: exit codes, and a log one can read."""

import logging

import luigi

from cache import StoreError
from pipeline.errors import UserError
from tasks.process import StageFailed

DEFAULTS = {
    ("core", "log_level"): "INFO",
    ("retcode", "already_running"): "10",
    ("retcode", "missing_data"): "20",
    ("retcode", "not_run"): "25",
    ("retcode", "task_failed"): "30",
    ("retcode", "scheduling_error"): "35",
    ("retcode", "unhandled_exception"): "40",
}
"""A script must see failure, and Luigi's own exit codes are all 0."""

PREFIX = "[pid %s] Worker %s "
NOISE = ("Informed scheduler that task", "Worker Worker(", "Done scheduling tasks", "Running Worker with")


def apply() -> None:
    config = luigi.configuration.get_config()
    for (section, option), value in DEFAULTS.items():
        if not config.has_option(section, option):
            config.set(section, option, value)
    logging.getLogger("luigi-interface").addFilter(_Readable())


class _Readable(logging.Filter):
    """Which task runs and how it ended, without process ids, worker names and tracebacks of what a stage has said."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], StageFailed | UserError | StoreError):
            record.msg, record.args = "%s", (record.exc_info[1],)
            record.exc_info = record.exc_text = None
        elif str(record.msg).startswith(PREFIX):
            record.msg, record.args = record.msg.removeprefix(PREFIX), record.args[2:]
        return record.levelno > logging.INFO or not str(record.msg).startswith(NOISE)
