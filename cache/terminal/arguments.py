"""The command line of a program: what is wrong with it is one line, which says what may have been meant."""

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from cache.core.text import printable
from cache.terminal.output import bad, say

USAGE_EXIT = 2


class Parser(argparse.ArgumentParser):
    """As argparse's own, without the usage above an error; subcommands have it too."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse; an unknown option is an error of this parser, which knows what it was meant to be."""
        found, rest = super().parse_known_args(args, namespace)
        if option := next((word.partition("=")[0] for word in rest if word.startswith("-")), ""):
            self.error(unknown(option, self._option_string_actions, "option"))
        return found, rest

    def _check_value(self, action, value) -> None:
        """argparse's message lists all choices; it has no public method for this."""
        choices = list(map(str, action.choices or ()))
        if choices and value not in action.choices:
            said = unknown(str(value), choices, "")
            raise argparse.ArgumentError(action, said if MEANT in said else f"{said}; choose from {', '.join(choices)}")

    def error(self, message: str) -> NoReturn:
        refuse(message, self.prog)


MEANT = "; did you mean "


def unknown(name: str, known: Iterable[str], kind: str = "task") -> str:
    """What to say of a name that is none of those known."""
    by_small_letters = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_small_letters, 1)
    meant = "".join(f"{MEANT}{by_small_letters[each]}?" for each in near)
    return f"there is no {kind} {printable(name)}".replace("  ", " ") + meant


def refuse(message: str, command: str) -> NoReturn:
    """End the process as argparse does.  command: what has a --help."""
    said = f"{message}{'' if message.endswith('?') else ';'} {command} --help says what there is"
    say(bad(f"error: {said}"), to_stderr=True)
    raise SystemExit(USAGE_EXIT)


def fail(message: str) -> NoReturn:
    """End the process with an error that is not one of the command line."""
    say(bad(f"error: {message}"), to_stderr=True)
    raise SystemExit(1)


def above_zero(text: str) -> int:
    """The ``type`` of an option that counts."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, found {text!r}")
    return int(text)
