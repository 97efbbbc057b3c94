"""Whatever bytes are in the store's files, and in the lists of others: a tool works, or ends with one line.

Bytes of any kind, files that were damaged in places, and JSON whose values are of the wrong kind.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import sqlite3
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from test_cache_faults import as_after_a_kill
from test_cache_store import ITEMS, array_of, assert_holds, entries_of, fill, segments

from cache import FileFacts, Need, Source, Store, StoreError, needs_text
from cache import __main__ as command_line
from cache.core.entries import Entries
from cache.tools import explain, show
from cache.tools.arguments import build_parser
from cache.tools.export import export
from pipeline.data.indexing import remembered
from pipeline.data.photos import Photo, list_photos
from pipeline.errors import UserError

SECONDS = 5
DEEP = "[" * 100_000 + "]" * 100_000
ROOM_BYTES = 1 << 30
DEPTH = int(os.environ.get("HYPOTHESIS_DEPTH", "1"))


def tries(number: int):
    """So many examples, the same ones each time; HYPOTHESIS_DEPTH times as many, and new ones, where that is set."""
    return settings(
        max_examples=number * DEPTH,
        derandomize=DEPTH == 1,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# --- what may be in a file ----------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(), st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.0, 0.5]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=40)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed_json(draw, original: bytes):
    """A JSON text in which one value is another, or is gone."""
    value = json.loads(original)
    place, parents = value, []
    while isinstance(place, dict | list) and place and (not parents or draw(st.booleans())):
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        parents.append((place, key))
        place = place[key]
    if parents:
        parent, key = parents[-1]
        if draw(st.integers(0, 3)):
            parent[key] = draw(VALUES)
        else:
            del parent[key]
    else:
        value = draw(VALUES)
    return json.dumps(value).encode()


@st.composite
def damaged(draw, original: bytes):
    """Bytes of which a part is other bytes, more or fewer."""
    start = draw(st.integers(0, len(original)))
    end = draw(st.integers(start, min(len(original), start + 64)))
    return original[:start] + draw(st.binary(max_size=64)) + original[end:]


@st.composite
def sealed_keys(draw):
    """The file ``keys`` of a segment with a checksum that holds, and any items and size."""
    text = b"".join(draw(st.lists(st.binary(min_size=16, max_size=16), max_size=4)))
    text += draw(st.sampled_from([0, 1, 100, 2**40, 2**63, 2**64 - 1])).to_bytes(8, "little")
    return text + google_crc32c.value(text).to_bytes(4, "little")


@st.composite
def sealed_journal(draw):
    """A journal with checksums that hold, and any values."""
    texts = [json.dumps(value).encode() for value in draw(st.lists(VALUES, min_size=1, max_size=3))]
    texts += [json.dumps([ITEMS[0], draw(st.text(max_size=9)), draw(VALUES)]).encode()]
    return b"".join(b"%08x %s\n" % (google_crc32c.value(text), text) for text in texts)


def contents(name: str, original: bytes):
    strategies = [st.binary(max_size=300), damaged(original)]
    if name.endswith(".json") or name in ("lease", "damage"):
        strategies += [changed_json(original)] * 3
    if name == "keys":
        strategies += [sealed_keys()] * 3
    if name == "journal":
        strategies += [sealed_journal()] * 3
    return st.one_of(strategies)


# --- a store with each kind of file -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A store with two recipes; the first has a file of each kind, the second is whole."""
    folder = tmp_path_factory.mktemp("hostile")
    entries = fill(entries_of(folder / "living", step=1), ITEMS[:3])
    fill(entries, ITEMS[3:5])
    entries.note_damage(entries.index().segments[1], [0])
    with entries.writer() as writer:
        writer.write(ITEMS[5], array_of(entries, 5), "5.png")
        as_after_a_kill(folder / "living", folder / "start/store")
    fill(entries_of(folder / "start/store", step=2), ITEMS[:3])
    needs = needs_of(folder / "start/store")
    for name, some in (("a", needs), ("b", needs[1:])):
        (folder / "start/runs" / name).mkdir(parents=True)
        (folder / "start/runs" / name / "needs.json").write_text(needs_text(some))
    (folder / "start/store/leases").mkdir()
    (folder / "start/store/leases" / segments(entries)[0].name).write_text(needs_text(needs))
    return folder / "start"


def needs_of(store: Path) -> list[Need]:
    sources = [Source(item, f"{number}.png", f"{number}.png") for number, item in enumerate(ITEMS[:6])]
    return [Need.of("EncodeImages", "vae", entries_of(store, step=step).recipe, sources) for step in (1, 2)]


def file_called(name: str, folder: Path) -> Path:
    entries = entries_of(folder / "store", step=1)
    first, second = segments(entries)
    (workspace,) = entries.path.glob("writing/*-*")
    return {
        "recipe.json": entries.path / "recipe.json",
        "keys": first / "keys",
        "zarr.json": first / "zarr.json",
        "shard": first / "c.0.0.0",
        "damage": entries.path / "damaged" / second.name,
        "journal": next(workspace.glob("*.journal")),
        "lease": folder / "store/leases" / first.name,
        "needs.json": folder / "runs/a/needs.json",
        "facts": folder / "store/facts.sqlite",
    }[name]


FILES = ("recipe.json", "keys", "zarr.json", "shard", "damage", "journal", "lease", "needs.json", "facts")


@contextlib.contextmanager
def little_room():
    """Not much more memory than there is in use: who takes more of it gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def ends_well(*arguments) -> tuple[int, str]:
    """Run a command of `python -m cache`: it works, or says in one line what is wrong.  Returns its code and output."""
    out, err, began = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO(), time.monotonic()
    with little_room(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line.main([str(argument) for argument in arguments])
    assert time.monotonic() - began < SECONDS and code in (0, 1), arguments
    said = err.getvalue().splitlines()
    assert not said or (len(said) == 1 and said[0].startswith("error: ") and code == 1), said
    return code, out.buffer.getvalue().decode()


def look_at_all(folder: Path) -> None:
    """Each of the tools; the second recipe, which is whole, is always found."""
    store, whole = folder / "store", entries_of(folder / "store", step=2)
    other = entries_of(store, step=1)
    collect = ("gc", "--store", store, "--runs", folder / "runs", "--older-than", "0s")
    for command in (("ls", store), ("stats", store), ("verify", store), collect):
        ends_well(*command, "--json"), ends_well(*command)
    held = {each["folder"]: each for each in json.loads(ends_well("ls", store, "--json")[1])}
    assert held[whole.path.name]["num_items"] == 3
    assert ends_well("ls", store, whole.path.name)[0] == 0
    ends_well("ls", store, other.path.name), ends_well("diff", other.path, whole.path)
    with little_room(), contextlib.suppress(StoreError):
        list(show.why(explain.why(Store(store), needs_of(store)), None))
    with little_room(), contextlib.suppress(StoreError):
        export(Store(store), needs_of(store)[:1], "latents", folder / "x.safetensors", force=True)
    ends_well("verify", "--repair", store)
    ends_well(*collect, "--yes")
    with contextlib.suppress(StoreError):
        fill(Entries([store], other.recipe), ITEMS[5:8])
    assert_holds(whole, ITEMS[:3])


@pytest.mark.parametrize("name", FILES)
@tries(5)
@given(data=st.data())
def test_no_content_of_a_file_of_the_store_ends_a_tool(start, name, data):
    original = file_called(name, start)
    look_with(start, name, data.draw(contents(name, original.read_bytes() if original.exists() else b"")))


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("keys", "shard", "facts")])
def test_what_is_nested_too_deep_ends_no_tool(start, name):
    sealed = b"%08x %s\n" % (google_crc32c.value(DEEP.encode()), DEEP.encode())
    look_with(start, name, sealed if name == "journal" else DEEP.encode())


def look_with(start: Path, name: str, content: bytes) -> None:
    folder = start.parent / "try"
    shutil.copytree(start, folder)
    try:
        file_called(name, folder).write_bytes(content)
        look_at_all(folder)
    finally:
        shutil.rmtree(folder)


# --- facts about files --------------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=20), st.binary(max_size=20)
)
FACTS = st.one_of(
    CELLS,
    VALUES.map(json.dumps),
    st.fixed_dictionaries({"digest": VALUES}, optional={"width": VALUES, "height": VALUES}).map(json.dumps),
    st.fixed_dictionaries({"width": VALUES}, optional={"height": VALUES}).map(json.dumps),
)


@tries(25)
@given(facts=FACTS, others=st.lists(CELLS, min_size=4, max_size=4))
@example(facts='{"digest": 5, "width": 1, "height": 1}', others=[0, 0, 0, 0])
@example(facts='{"width": 1}', others=[0, 0, 0, 0])
@example(facts=DEEP, others=[0, 0, 0, 0])
@example(facts=None, others=[0, 0, 0, 0])
def test_no_row_of_the_facts_ends_a_look_at_files(tmp_path_factory, facts, others):
    folder = tmp_path_factory.mktemp("facts")
    files = [folder / "a.png", folder / "b.png"]
    for file in files:
        file.write_bytes(file.name.encode())
        os.utime(file, (1e9, 1e9))
    right = FileFacts(folder / "none").file_digests(files)
    FileFacts(folder / "facts.sqlite").file_digests(files)
    with contextlib.closing(sqlite3.connect(folder / "facts.sqlite")) as db, db:
        db.execute("UPDATE files SET facts = ? WHERE path = ?", (facts, os.fsencode(files[0])))
        db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (b"x", *others, "{}"))
    known, photos = FileFacts(folder / "facts.sqlite"), [Photo(str(folder), file.name, "") for file in files]
    remembered(photos, known)
    found = known.file_digests(files)
    assert all(isinstance(each, str) and len(each) == 32 for each in found.values())
    assert found[files[1]] == right[files[1]]
    known.put(files[0], {"width": 1})
    assert not (folder / "facts.sqlite.damaged").exists()  # one bad row takes no other away
    shutil.rmtree(folder)


# --- lists and arguments of others --------------------------------------------------------------------------------

ROWS = st.fixed_dictionaries(
    {"file_name": st.one_of(st.sampled_from(["b.png", "a.png", "../a", "/a", ".", "", "a\0", "\ud800"]), VALUES)},
    optional={"text": VALUES, "conditioning_image": VALUES},
)
LINES = st.one_of(st.binary(max_size=60), ROWS.map(lambda row: json.dumps(row).encode()), VALUES.map(json.dumps))


@tries(100)
@given(lines=st.lists(LINES, max_size=4), prompt=st.sampled_from(["", "a prompt"]))
def test_a_bad_line_of_metadata_costs_no_other(tmp_path_factory, lines, prompt):
    folder = tmp_path_factory.getbasetemp() / "metadata"
    folder.mkdir(exist_ok=True)
    for name in ("good.png", "b.png"):
        (folder / name).touch()
    good = b'{"file_name": "good.png", "text": "a good one"}'
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    (folder / "metadata.jsonl").write_bytes(b"\n".join([*raw, good]))
    photos, problems = list_photos(folder, prompt)
    assert Photo(str(folder), "good.png", prompt or "a good one") in photos
    assert len(photos) + len(problems) <= b"\n".join([*raw, good]).count(b"\n") + 1
    for problem in problems:
        assert problem.reason and isinstance(problem.name, str)


@tries(60)
@given(content=st.binary(max_size=200))
def test_no_metadata_ends_a_listing(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any-metadata"
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_bytes(content)
    try:
        photos, problems = list_photos(folder)
    except UserError as refusal:
        assert str(refusal).startswith(str(folder))
    else:  # there is no photo in the folder, so every line of it is a problem
        assert all(problem.reason for problem in problems) and not any(photo.path.is_file() for photo in photos)


ARGUMENTS = st.text(st.characters(exclude_characters="\0"), max_size=12)


@tries(100)
@given(age=st.one_of(ARGUMENTS, st.from_regex(r"\A\d{1,12}[smhdx]?\Z")))
def test_an_age_is_a_number_of_seconds_or_refused(age):
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = build_parser().parse_args(["gc", f"--older-than={age}"]).older_than
    except SystemExit as error:
        assert error.code == 2
    else:
        assert 0 <= found <= 86400 * 10**9 and np.isfinite(found)


@tries(12)
@given(
    name=st.binary(min_size=1, max_size=12).filter(lambda name: not {0, ord("/"), ord("\n")} & set(name)),
    kind=ARGUMENTS,
)
@example(name=b"\xff", kind="")
def test_any_name_of_a_store_and_any_kind_can_be_said(start, name, kind):
    name = name.strip(b".") or b"x"
    store = Path(os.fsdecode(os.fsencode(start.parent / "named-") + name))
    shutil.copytree(start / "store", store)
    try:
        for command in (("ls",), ("stats",), ("verify", f"--kind={kind}"), ("verify",)):
            ends_well(*command, store)
    finally:
        shutil.rmtree(store)
