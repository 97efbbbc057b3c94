"""The tools of the store: what it holds, whether that is sound, and why something is not there."""

import argparse
import errno
import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

from cache.core.errors import StoreError
from cache.core.folders import check_store, entries_at, entries_called
from cache.core.needs import as_needs, needs_of_runs, union
from cache.tools import compare, explain, export, garbage, listing, show, verify

DEFAULT_STORE = "store"
DEFAULT_AGE = "1h"
PROGRESS_SECONDS = 5
AGE = re.compile(r"(\d+)([smhd])")
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
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
    for add in (_add_ls, _add_stats, _add_verify, _add_why, _add_diff, _add_export, _add_gc):
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


def _add_gc(commands):
    text = "list what nobody needs any more; removes it with --yes, keeps what the experiments and all runs need"
    parser = _add(commands, "gc", _gc, text + ", what running stages need, and what is young")
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
    if not (found := AGE.fullmatch(age)):
        raise argparse.ArgumentTypeError(f"{age!r} is no age; give a number and s, m, h or d, such as 12h")
    return int(found[1]) * UNIT_SECONDS[found[2]]


def _stores(place: str) -> list[Path]:
    if not place.endswith(".toml"):
        return [check_store(Path(place))]
    from pipeline.errors import UserError
    from pipeline.settings.reading import load_experiment  # as in _needs

    try:
        return [check_store(path) for path in load_experiment(place).stores]
    except UserError as error:
        raise StoreError(str(error)) from error


def _needs(experiment: str):
    """What an experiment needs. The store knows nothing of the pipeline, but this command line stands above both."""
    from pipeline.errors import UserError
    from pipeline.plan.needs import needs_of

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


def _gc(options):
    store, keep = _store_and_needs(options)
    act = garbage.collect if options.yes else garbage.find_garbage
    found = act(store, keep, options.older_than)
    _print(options, [each.summary() for each in found], show.garbage(store, found, options.yes))


def _store_and_needs(options):
    """The store to collect in, and all that is to be kept there. Raises StoreError where either is not certain."""
    several = [_needs(path) for path in options.experiments]
    stores = {store.path for store, _ in several} if options.store is None else {check_store(options.store)}
    if len(stores) != 1:
        which = ", ".join(map(str, sorted(stores)))
        raise StoreError(
            f"the experiments write to different stores ({which}); collect in one at a time"
            if stores
            else "name the experiments whose entries are kept, or --store and --runs"
        )
    folders = [*options.runs, *map(_runs, options.experiments)]
    if not folders:
        raise StoreError("name the experiments, or the folders of --runs, whose entries are kept")
    if gone := [folder for folder in options.runs if not folder.is_dir()]:
        raise StoreError(f"{gone[0]}: there is no such folder of runs")
    return stores.pop(), union([*(as_needs(needs) for _, needs in several), *map(needs_of_runs, folders)])


def _runs(experiment: str) -> Path:
    from pipeline.settings.reading import load_experiment  # as in _needs

    return load_experiment(experiment).runs


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
