"""What the tests of the store's tools share: entries to write, ways to damage them, and the command line."""

import json
from pathlib import Path

from test_cache_store import ITEMS, array_of, segments

from cache import (
    Entries,
    Need,
    Source,
)
from cache import __main__ as command_line

NASTY = 'a "quoted"\ncat \x1b[2J\u202e ünï 猫'


def run(capsys, *arguments):
    """The exit code and what the command line printed: (code, stdout, stderr)."""
    code = command_line.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def as_json(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def write(entries, *sources):
    """Commit one entry for each (item, name) in one segment."""
    with entries.writer() as writer:
        for item, name in sources:
            writer.write(item, array_of(entries, ITEMS.index(item) if item in ITEMS else 99), name)
    return entries


def image(number, name=""):
    name = name or f"{number}.png"
    return Source(ITEMS[number], name, name)


def need_of(entries, *sources, stage="EncodeImages", component="vae", role=""):
    return Need.of(stage, component, entries.recipe, sources, role)


def shard(segment):
    return next(path for path in segment.iterdir() if path.name.startswith("c."))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def damage_row(entries, row, segment=0):
    flip(shard(segments(entries)[segment]), row * entries.layout.stride_bytes)


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def fresh(entries):
    return Entries(entries.stores, entries.recipe)
