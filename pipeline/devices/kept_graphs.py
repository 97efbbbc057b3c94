"""Compiled graphs that are kept in the user's own cache folder, so that the next process starts with them.

MindSpore's compile cache writes what the front end has made of a function, which is most of the time that compiling
takes, and reads it in the next process.  Four things it leaves to its caller, and they are here:

- It numbers the graphs of a process in the order in which they are compiled, and takes the same number of the process
  before, whatever that was.  So each first step has a folder, named by all that decides its graphs, in which they are
  numbered from 0; only while it is taken is the cache on.
- A graph that is read is given its parameters by name, for a cell only, as `Cell.parameters_dict` has them; a
  function's graph would compute with memory that nobody has written.  So all that is compiled here is a `cell_of`.
- It writes in place and checks nothing.  So it gets a copy for this process alone, and files count with their digests.
- It asks whether the script that runs is still the one of before, and after one "no" reads no other graph in this
  process.  So it is told not to ask: what decides a graph is in the folder's name.

The folder is never one that others can write to: a graph may hold Python code.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from cache import canonical, digest, load_json, write_atomically
from cache.terminal.places import shown
from pipeline.process.progress import say

ENABLE, PLACE, UNASKED = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH", "MS_DEV_FORCE_USE_COMPILE_CACHE"
LIBRARIES = "mindspore", "mindone"
DIGESTS = "digests.json"
NO_SCRIPT = Path(__file__).with_name("__init__.py")
"""A file that imports nothing.  MindSpore reads the script that runs, and all that this imports, though it compares
nothing, and would fail where there is no script, as with python -c."""

MOST = 64
"""Folders that are kept, those that were used last."""

_workplace: tempfile.TemporaryDirectory | None = None
"""Where MindSpore reads and writes in this process: it asks once."""

_num_compiled: int | None = 0
"""Graphs that were compiled in this process while the cache was on; None where that is not sure, and none is kept."""


@contextlib.contextmanager
def keeping(decided: Mapping) -> Iterator[Path | None]:
    """A block whose graphs are those of an earlier process with the same ``decided``, or are kept for later ones.

    decided: all that decides the graphs beside the libraries, this machine's architecture and MindSpore's environment,
    as JSON has it.  Gives the folder that they are taken from, or None.
    """
    global _num_compiled
    folder = None if _num_compiled is None else _folder_or_none(decided)
    if not folder or _num_compiled is None:
        yield None
        return
    own, start = _own(), _num_compiled
    known = _take(folder, own, start)
    with _switched_on(own):
        already, _num_compiled = _compilations(), None
        yield folder if known else None
        _num_compiled = start + _compilations() - already
        _keep(own, start, folder, known)


@contextlib.contextmanager
def _switched_on(own: Path) -> Iterator[None]:
    """MindSpore's cache is on, and in a folder."""
    from mindspore.common import api

    script, before = api.entry_script_path, {name: os.environ.get(name) for name in (ENABLE, PLACE, UNASKED)}
    api.entry_script_path = str(NO_SCRIPT)
    os.environ |= {ENABLE: "1", PLACE: str(own), UNASKED: "1"}
    try:
        yield
    finally:
        api.entry_script_path = script
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}


def cell_of(function: Callable, parameters: Iterable):
    """A cell that computes ``function`` of its arguments.  parameters: all that it reads.

    Raises ValueError where two of them have one name.
    """
    from mindspore import nn

    parameters = list(parameters)
    found = {parameter.name: parameter for parameter in parameters}
    if len(found) < len(parameters):
        raise ValueError("two parameters have one name, by which a kept graph could not tell them apart")

    class Cell(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.function = function

        def construct(self, *arguments):
            return self.function(*arguments)

        def parameters_dict(self, recurse=True):
            return found

    return Cell()


def sources(*packages: str) -> str:
    """The digest of all Python files of some packages: a graph is of the code that it was compiled from."""
    found = []
    for package in sorted(set(packages)):
        spec = find_spec(package)
        for place in spec.submodule_search_locations or [] if spec else []:
            paths = sorted(Path(place).rglob("*.py"))
            found += [(str(path.relative_to(place)), digest(path.read_bytes())) for path in paths]
    return digest(canonical(found))


def root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindspore-flux-finetune" / "graphs"


def _folder_or_none(decided: Mapping) -> Path | None:
    """Where the graphs are or will be; None where none can be kept, which is said."""
    try:
        place = root()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = place.stat()
        _own()
    except (OSError, RuntimeError) as error:  # the latter of a user without a home
        say(f"compiled steps are not kept for later: {error}")
        return None
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        say(f"compiled steps are not kept for later: others can write to {shown(place)}")
        return None
    libraries = {name: version(name) for name in LIBRARIES}
    asked = {name: value for name, value in os.environ.items() if name.startswith("MS_DEV_")}
    own = {"libraries": libraries, "machine": platform.machine(), "environment": asked}
    return place / digest(canonical({**own, **decided}))


def _own() -> Path:
    global _workplace
    _workplace = _workplace or tempfile.TemporaryDirectory(prefix="graphs-", ignore_cleanup_errors=True)
    return Path(_workplace.name)


def _compilations() -> int:
    """What this process has compiled so far."""
    from mindspore.common import api

    return len(api.ms_compile_cache)


def _numbered(name: str, shift: int) -> str:
    """The name of a graph's file with another number."""
    return re.sub(r"(compile_cache_)(\d+)", lambda found: f"{found[1]}{int(found[2]) + shift}", name)


def _digests(folder: Path, start: int = 0) -> dict[str, str]:
    """Of the files of a folder, those of graphs from number ``start`` on, counted from there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        number = re.search(r"compile_cache_(\d+)", path.name)
        if path.is_file() and path.name != DIGESTS and (not number or int(number[1]) >= start):
            found[_numbered(str(path.relative_to(folder)), -start)] = digest(path.read_bytes())
    return found


def _take(folder: Path, own: Path, start: int) -> dict[str, str]:
    """Copy what is kept, if it is whole, to where MindSpore will look for it.  Returns its digests.

    start: the number of the next graph of this process.
    """
    with contextlib.suppress(OSError, ValueError):
        kept = load_json((folder / DIGESTS).read_text())
        if kept and kept == _digests(folder):
            for name in kept:
                _copy(folder / name, own / _numbered(name, start))
            os.utime(folder)
            return kept
    return {}


def _keep(own: Path, start: int, folder: Path, known: Mapping[str, str]) -> None:
    """Put the graphs from number ``start`` on in place of what is kept; what was used longest ago goes."""
    digests = _digests(own, start)
    if not digests or digests == known:
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent, ignore_cleanup_errors=True) as partial:
            whole = Path(partial) / "whole"
            for name in digests:
                _copy(own / _numbered(name, start), whole / name)
            write_atomically(whole / DIGESTS, json.dumps(digests))
            shutil.rmtree(folder, ignore_errors=True)
            whole.rename(folder)
        for old in sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):  # another process keeps the same
            say(f"compiled steps are not kept for later: {error.filename or folder}: {error.strerror}")


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        to.unlink()  # MindSpore's are read-only
    shutil.copyfile(path, to)
