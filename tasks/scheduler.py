"""Which scheduler the ``luigi`` command uses: the local one, unless the user names a central one, which must answer."""

import json
import sys
import threading
import warnings

import luigi
from luigi import rpc
from luigi.cmdline_parser import CmdlineParser

from tasks import manners

OPTIONS = ("scheduler_url", "scheduler_host", "scheduler_port")
SETTINGS = (*OPTIONS, *(f"default-{name.replace('_', '-')}" for name in OPTIONS), "local_scheduler")
"""All that Luigi reads of its section [core] to find its scheduler, the names of older configuration files too."""

QUESTION = "is_paused"
"""A request that every luigid answers and that changes nothing there."""

ANSWER_SECONDS = 4
RETRY_SECONDS = 10
"""Between the three times that Luigi asks a scheduler that has fallen silent; left to itself, it waits 30."""


def choose(task_family: str) -> None:
    """Decide for the ``luigi`` command whose task this is; do nothing for the tasks behind it.

    Ends the process with one line where the central scheduler that is to be used does not answer.  `luigi.build`, whose
    callers say in their program which scheduler they want, is left as Luigi has it.
    """
    command = CmdlineParser.get_instance()
    if command is None or command.known_args.root_task != task_family:
        return
    name = _named(command.known_args)
    if not name:
        manners.set_default("core", "local_scheduler", True)
    elif not _value("local_scheduler"):
        _check_answers(_url(), name)
        manners.set_default("core", "rpc-retry-wait", RETRY_SECONDS)
        manners.set_default("core", "rpc-log-retries", False)
        warnings.filterwarnings("ignore", "The configuration contains the parameter 'rpc_")  # Luigi does not know them


def configured() -> str:
    """The URL of the central scheduler that Luigi's configuration names; empty where it names none."""
    return _url() if _configured() and not _value("local_scheduler") else ""


def _url() -> str:
    return _value("scheduler_url") or "http://{}:{}/".format(*map(_value, OPTIONS[1:]))


def _named(options) -> str:
    """The option or setting by which the user says where the scheduler is; empty where none does."""
    for name in OPTIONS:
        if getattr(options, f"core_{name}"):
            return f"--{name.replace('_', '-')}"
    return _configured()


def _configured() -> str:
    config = luigi.configuration.get_config()
    found = [name for name in SETTINGS if str(config.get("core", name, ""))]
    return f"[core] {found[0]} of Luigi's configuration" if found else ""


def _value(name: str):
    """What Luigi takes for one of its own parameters: of the command, of its configuration, or its default."""
    return getattr(luigi.interface.core, name).task_value("core", name)


def _check_answers(url: str, name: str) -> None:
    """End the process where no scheduler answers at ``url``.  name: what asks for it."""
    if reason := silence(url):
        sys.exit(
            f"error: {url}: no Luigi scheduler answers there ({reason}); start luigid there, remove {name}, or add "
            "--local-scheduler"
        )


def silence(url: str) -> str:
    """Why no scheduler answers, in a few words; empty where one does, within ANSWER_SECONDS."""
    found = [f"not within {ANSWER_SECONDS} seconds"]
    # In a thread, as to look up the name of a host has no timeout; the request itself has one, a little longer.
    thread = threading.Thread(target=lambda: found.append(_ask(url)), daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return found[-1]


def _ask(url: str) -> str:
    """As `silence`, without a limit of its own.  Asks as Luigi does, for any URL it knows."""
    client = rpc.RequestsFetcher() if rpc.HAS_REQUESTS else rpc.URLLibFetcher()
    try:
        json.loads(client.fetch(f"{url.rstrip('/')}/api/{QUESTION}", {"data": "{}"}, 2 * ANSWER_SECONDS))["response"]
        return ""
    except client.raises as error:
        return _innermost(error)
    except (ValueError, KeyError, TypeError):
        return "what answers is something else"


def _innermost(error: BaseException) -> str:
    """What the operating system said, without what every layer above has made of it."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)
