"""The tools of the store: what it holds, whether that is sound, and why something is not there."""

import argparse
import errno
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from . import compare, explain, export, listing, show, verify
from .errors import StoreError
from .folders import check_store, entries_at, entries_called

DEFAULT_STORE = "store"
PROGRESS_SECONDS = 5
INTERRUPTED_EXIT = 130  # what a shell reports for a process ended by Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except StoreError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT
    except OSError as error:
        if error.errno is None or not error.filename:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _fail(f"{error.filename}: {error.strerror}; {'make room' if full else 'check it and its permissions'}")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


# --- what the arguments mean ---------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cache", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_ls, _add_stats, _add_verify, _add_why, _add_diff, _add_export):
        add(commands).add_argument("--json", action="store_true", help="print everything, as JSON")
    return parser


def _add(commands, name, command, text):
    parser = commands.add_parser(name, help=text.partition(";")[0], description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_place(parser):
    text = f"folder of a store ({DEFAULT_STORE}, unless given), or an experiment file (*.toml): the stores that it uses"
    parser.add_argument("place", nargs="?", default=DEFAULT_STORE, metavar="STORE|EXPERIMENT", help=text)


def _add_experiment(parser):
    text = "experiment file; without it, the embedded default"
    parser.add_argument("experiment", nargs="?", default="", metavar="EXPERIMENT", help=text)


def _add_ls(commands):
    parser = _add(commands, "ls", _ls, "list what a store holds by recipe; of one recipe, all that it says and holds")
    _add_place(parser)
    parser.add_argument("folder", nargs="?", metavar="KIND-ID", help="one recipe, such as latents-3f2a: its items")
    return parser


def _add_stats(commands):
    parser = _add(commands, "stats", _stats, "count entries and bytes by kind; also duplicates, damage and free space")
    _add_place(parser)
    return parser


def _add_verify(commands):
    text = "read everything and check it; what is damaged is noted, so that the next run encodes just that again"
    parser = _add(commands, "verify", _verify, text + "; ends with 1 where there is damage")
    _add_place(parser)
    parser.add_argument("--kind", default="", help="only this kind, such as latents")
    mend = "write damaged zarr.json, keys and shard indices anew (without: say which)"
    parser.add_argument("--repair", action="store_true", help=mend)
    return parser


def _add_why(commands):
    text = "say why entries of an experiment are missing; by what is known: verify finds damage that nobody met yet"
    parser = _add(commands, "why", _why, text)
    _add_experiment(parser)
    parser.add_argument("--all", action="store_true", help=f"name every item, not just {show.EXAMPLES} for each reason")
    return parser


def _add_diff(commands):
    parser = _add(commands, "diff", _diff, "compare two experiments, or two folders of entries (STORE/entries/KIND-ID)")
    for name in "ab":
        parser.add_argument(name, metavar=name.upper(), help="experiment file or folder of entries")
    return parser


def _add_export(commands):
    parser = _add(commands, "export", _export, "write cached tensors to a safetensors file; by caption or file name")
    _add_experiment(parser)
    parser.add_argument("--kind", required=True, choices=export.KINDS, help=", ".join(export.KINDS), metavar="KIND")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="such as prompts.safetensors")
    parser.add_argument("--force", action="store_true", help="replace the file where it is there already")
    return parser


def _stores(place: str) -> list[Path]:
    if not place.endswith(".toml"):
        return [check_store(Path(place))]
    from pipeline.errors import UserError
    from pipeline.experiment import load_experiment  # as in _needs

    try:
        return [check_store(path) for path in load_experiment(place).stores]
    except UserError as error:
        raise StoreError(str(error)) from error


def _needs(experiment: str):
    """What an experiment needs. The store knows nothing of the pipeline, but this command line stands above both."""
    from pipeline.errors import UserError
    from pipeline.needs import needs_of

    try:
        return needs_of(experiment)
    except UserError as error:
        raise StoreError(str(error)) from error


def _sides(place: str) -> list[compare.Side]:
    path = Path(place)
    return compare.held_in(entries_at(path.absolute())) if path.is_dir() else compare.needed(_needs(place)[1])


# --- the commands --------------------------------------------------------------------------------------------------


def _ls(options):
    stores = _stores(options.place)
    if options.folder:
        entries = entries_called(options.folder, stores)
        rows = list(listing.rows(entries))
        found = {"folder": entries.path.name, "recipe": entries.recipe, "rows": rows}
        _print(options, found, show.items(entries, rows))
    else:
        found = {store: listing.held(store) for store in stores}
        _print(options, [each for held in found.values() for each in held], show.stores(found))


def _stats(options):
    found = [listing.stats(store) for store in _stores(options.place)]
    _print(options, found, show.stats(found))


def _verify(options):
    stores = _stores(options.place)
    report = verify.verify(stores, options.kind, options.repair, _progress())
    _print(options, asdict(report) | {"is_sound": report.is_sound}, show.report(stores[0], report))
    return int(not report.is_sound)


def _progress():
    """Prints how far it is every few seconds."""
    said = time.monotonic()

    def progress(report):
        nonlocal said
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            print(show.progress(report), file=sys.stderr, flush=True)

    return progress


def _why(options):
    store, needs = _needs(options.experiment)
    answers = explain.why(store, needs)
    found = [asdict(each) | {"missing": each.num_missing} for each in answers]
    _print(options, found, show.why(answers, None if options.all else show.EXAMPLES))


def _diff(options):
    pairs = compare.diff(_sides(options.a), _sides(options.b))
    _print(options, pairs, show.diff(pairs))


def _export(options):
    store, needs = _needs(options.experiment)
    found = export.export(store, needs, options.kind, options.out, options.force, options.experiment)
    _print(options, found, show.exported(found))


def _print(options, found, lines):
    """What was found, as JSON, or as the lines for people that say so."""
    if options.json:
        print(json.dumps(found, indent=1, default=asdict))
    else:
        for line in lines:
            print(line)
    sys.stdout.flush()  # here, where it can still be said that nobody reads on


if __name__ == "__main__":
    sys.exit(main())
