"""The arguments of `python -m cache`."""

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _SubParsersAction
from collections.abc import Callable
from pathlib import Path

from cache.terminal.arguments import Parser
from cache.tools import commands
from cache.tools.export import KINDS
from cache.tools.show import EXAMPLES

Subparsers = _SubParsersAction  # what add_subparsers returns; argparse has no public name for it
DESCRIPTION = "The tools of the store: what it holds, whether that is sound, and why something is not there."
DEFAULT_STORE = "store"
DEFAULT_AGE = "1h"
AGE = re.compile(r"(\d{1,9})([smhd])")
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def build_parser() -> ArgumentParser:
    """The parser of the command line. Parsed options have ``command``: the function of `commands` that runs them."""
    found = Parser(prog="python -m cache", description=DESCRIPTION)
    subparsers = found.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_ls, _add_stats, _add_verify, _add_why, _add_diff, _add_export, _add_gc):
        add(subparsers).add_argument("--json", action="store_true", help="print everything, as JSON")
    return found


def _add(subparsers: Subparsers, name: str, command: Callable[[Namespace], int], text: str) -> ArgumentParser:
    """Add a command. text: what it does; --help of the whole has the part before the first semicolon."""
    parser = subparsers.add_parser(name, help=text.partition(";")[0], description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_place(parser: ArgumentParser) -> None:
    text = f"folder of a store ({DEFAULT_STORE}, unless given), or an experiment file (*.toml): the stores that it uses"
    parser.add_argument("place", nargs="?", default=DEFAULT_STORE, metavar="STORE|EXPERIMENT", help=text)


def _add_experiment(parser: ArgumentParser) -> None:
    text = "experiment file; without it, the embedded default"
    parser.add_argument("experiment", nargs="?", default="", metavar="EXPERIMENT", help=text)


def _add_ls(subparsers: Subparsers) -> ArgumentParser:
    text = "list what a store holds by recipe; of one recipe, all that it says and holds"
    parser = _add(subparsers, "ls", commands.run_ls, text)
    _add_place(parser)
    parser.add_argument("folder", nargs="?", metavar="KIND-ID", help="one recipe, such as latents-3f2a: its items")
    return parser


def _add_stats(subparsers: Subparsers) -> ArgumentParser:
    text = "count entries and bytes by kind; also duplicates, damage and free space"
    parser = _add(subparsers, "stats", commands.run_stats, text)
    _add_place(parser)
    return parser


def _add_verify(subparsers: Subparsers) -> ArgumentParser:
    text = "read everything and check it; what is damaged is noted, so that the next run encodes just that again"
    parser = _add(subparsers, "verify", commands.run_verify, text + "; ends with 1 where there is damage")
    _add_place(parser)
    parser.add_argument("--kind", default="", help="only this kind, such as latents")
    mend = "write damaged zarr.json, keys and shard indices anew (without: say which)"
    parser.add_argument("--repair", action="store_true", help=mend)
    return parser


def _add_why(subparsers: Subparsers) -> ArgumentParser:
    text = "say why entries of an experiment are missing; by what is known: verify finds damage that nobody met yet"
    parser = _add(subparsers, "why", commands.run_why, text)
    _add_experiment(parser)
    parser.add_argument("--all", action="store_true", help=f"name every item, not just {EXAMPLES} for each reason")
    return parser


def _add_diff(subparsers: Subparsers) -> ArgumentParser:
    text = "compare two experiments, or two folders of entries (STORE/entries/KIND-ID)"
    parser = _add(subparsers, "diff", commands.run_diff, text)
    for name in "ab":
        parser.add_argument(name, metavar=name.upper(), help="experiment file or folder of entries")
    return parser


def _add_export(subparsers: Subparsers) -> ArgumentParser:
    text = "write cached tensors to a safetensors file; by caption or file name"
    parser = _add(subparsers, "export", commands.run_export, text)
    _add_experiment(parser)
    parser.add_argument("--kind", required=True, choices=KINDS, help=", ".join(KINDS), metavar="KIND")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="such as prompts.safetensors")
    parser.add_argument("--force", action="store_true", help="replace the file where it is there already")
    return parser


def _add_gc(subparsers: Subparsers) -> ArgumentParser:
    text = "list what nobody needs any more; removes it with --yes, keeps what the experiments and all runs need"
    parser = _add(subparsers, "gc", commands.run_gc, text + ", what running stages need, and what is young")
    help_text = "experiment file: what it and the runs in its [paths] runs need is kept"
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=help_text)
    runs = "another folder of runs, whose needs are kept too"
    parser.add_argument("--runs", type=Path, action="append", default=[], metavar="DIR", help=runs)
    store = "folder of the store (the first store of the experiments, unless given)"
    parser.add_argument("--store", type=Path, metavar="DIR", help=store)
    age = f"keep what is younger, such as 90m, 12h or 30d ({DEFAULT_AGE}, unless given)"
    parser.add_argument("--older-than", type=_seconds, default=_seconds(DEFAULT_AGE), metavar="AGE", help=age)
    parser.add_argument("--yes", action="store_true", help="remove it (without: only say what would be removed)")
    return parser


def _seconds(age: str) -> int:
    """An age such as 12h, in seconds."""
    if not (match := AGE.fullmatch(age)):
        raise ArgumentTypeError(f"{age!r} is no age; give a number and s, m, h or d, such as 12h")
    return int(match[1]) * UNIT_SECONDS[match[2]]
