"""The commands of `python -m cache`: each takes the parsed arguments, prints what it found and returns an exit code."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from cache.core.errors import StoreError
from cache.core.files import named
from cache.core.folders import check_store, entries_at, entries_called
from cache.core.needs import as_needs, needs_by_run
from cache.terminal import output
from cache.terminal.places import shown
from cache.terminal.progress import Progress
from cache.tools import compare, experiments, explain, export, garbage, keepers, listing, show, verify

STANDARD_OUTPUT = "standard output"


def run_ls(options: Namespace) -> int:
    """List what each store holds by recipe or, where a recipe is named, all that is stored of it."""
    stores = _stores(options.place)
    if options.folder:
        entries = entries_called(options.folder, stores)
        rows = list(listing.rows(entries))
        what = {"folder": entries.path.name, "recipe": entries.recipe, "rows": rows}
        return _print(options, what, show.items(entries, rows))
    held = {store: listing.held(store) for store in stores}
    return _print(options, [each for several in held.values() for each in several], show.stores(held))


def run_stats(options: Namespace) -> int:
    """Count entries and bytes by kind."""
    totals = [listing.stats(store) for store in _stores(options.place)]
    return _print(options, totals, show.stats(totals))


def run_verify(options: Namespace) -> int:
    """Read and check everything. Returns 1 where there is damage."""
    stores = _stores(options.place)
    with Progress("verify", 0, "segment", says_end=False) as progress:

        def say_how_far(report: verify.Report) -> None:
            progress.set(report.num_segments, report.num_expected, show.progress(report))

        report = verify.verify(stores, options.kind, options.repair, say_how_far)
    _print(options, asdict(report) | {"is_sound": report.is_sound}, show.report(stores[0], report))
    return int(not report.is_sound)


def run_why(options: Namespace) -> int:
    """Say why entries that an experiment needs are missing."""
    store, needs = experiments.needs_of(options.experiment)
    answers = explain.why(store, needs)
    found = [asdict(each) | {"missing": each.num_missing} for each in answers]
    return _print(options, found, show.why(answers, None if options.all else show.EXAMPLES))


def run_diff(options: Namespace) -> int:
    """Compare two experiments or two folders of entries."""
    pairs = compare.diff(_sides(options.a), _sides(options.b))
    return _print(options, pairs, show.diff(pairs))


def run_export(options: Namespace) -> int:
    """Write the tensors that an experiment needs to a safetensors file."""
    store, needs = experiments.needs_of(options.experiment)
    found = export.export(store, needs, options.kind, options.out, options.force, options.experiment)
    return _print(options, found, show.exported(found))


def run_gc(options: Namespace) -> int:
    """List what nobody needs, and remove it with --yes."""
    store, several = _store_and_keepers(options)
    act = garbage.collect if options.yes else garbage.find_garbage
    found = act(store, keepers.union_of(several), options.older_than)
    lines = [*show.kept(keepers.kept(store, several), found), *show.garbage(store, found, options.yes)]
    return _print(options, [each.summary() for each in found], lines)


def _stores(place: str) -> list[Path]:
    """The folders of the stores that are named, by an experiment file or by a folder."""
    paths = experiments.stores_of(place) if place.endswith(".toml") else (Path(place),)
    return [check_store(path) for path in paths]


def _sides(place: str) -> list[compare.Side]:
    path = Path(place)
    if path.is_dir():
        return compare.held_in(entries_at(path.absolute()))
    return compare.needed(experiments.needs_of(place)[1])


def _store_and_keepers(options: Namespace) -> tuple[Path, keepers.Keepers]:
    """The store to collect in, and for whom what is kept there. Raises StoreError where either is not certain."""
    several = [experiments.needs_of(path) for path in options.experiments]
    stores = {store.path for store, _ in several} if options.store is None else {check_store(options.store)}
    if len(stores) != 1:
        which = ", ".join(map(str, sorted(stores)))
        raise StoreError(
            f"the experiments write to different stores ({which}); collect in one at a time"
            if stores
            else "name the experiments whose entries are kept, or --store and --runs"
        )
    folders = [*options.runs, *map(experiments.runs_of, options.experiments)]
    if not folders:
        raise StoreError("name the experiments, or the folders of --runs, whose entries are kept")
    if gone := [folder for folder in options.runs if not folder.is_dir()]:
        raise StoreError(f"{gone[0]}: there is no such folder of runs")
    of_experiments = [(path, as_needs(needs)) for path, (_, needs) in zip(options.experiments, several)]
    each_once = dict.fromkeys(Path(folder).absolute() for folder in folders)  # a link stays one: it may lead nowhere
    of_runs = [(shown(run), needs) for folder in each_once for run, needs in needs_by_run(folder)]
    return stores.pop(), [*of_experiments, *of_runs]


def _print(options: Namespace, found: object, lines: Iterable[show.Part]) -> int:
    """Print what was found as JSON or, for people, as lines. Returns 0, the exit code of a command that worked."""
    with named(STANDARD_OUTPUT):
        if options.json:
            print(json.dumps(found, indent=1, default=asdict))
            sys.stdout.flush()  # here, where it can still be said that nobody reads on
        else:
            output.show(*lines)
    return 0
