"""What the demos share: showing a command and running it, and saying what stages cost and pictures show.

What takes long to import is imported while a command runs.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
FOR_RESULTS = ("pipeline.methods", "pipeline.records", "pipeline.synthetic.score", "cache.terminal.table")
"""What takes long to import of what reads results: as long as a finished command takes."""

atexit.register(gc.freeze)  # Python's last look for garbage takes as long as a short command


def show_and_run(*command: str) -> None:
    print("  $", " ".join(["python" if part == sys.executable else part for part in command]), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with contextlib.suppress(KeyboardInterrupt):
        for name in FOR_RESULTS:
            importlib.import_module(name)
    from pipeline.process.stopping import INTERRUPTED_EXIT

    code = _waited_for(process)
    if code == INTERRUPTED_EXIT:
        sys.exit(code)  # it has said what is kept
    if code:
        sys.exit(f"the command above ended with {code}")


def _waited_for(process: subprocess.Popen) -> int:
    """The exit code of a process, which Ctrl-C reaches as it does this one: it ends in its own time."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def report_costs(*folders: Path) -> None:
    """Say what the stages cost whose records are in some folders."""
    from cache.terminal.output import show
    from cache.terminal.table import Table
    from cache.terminal.words import duration, human_bytes
    from pipeline import records

    say("What each stage cost when it last had work, in a process of its own:")
    rows = []
    for record in records.read(*dict.fromkeys(folders)):
        peak = human_bytes(record["peak_memory_bytes"]["process"])
        rows.append((record["stage"], duration(record["seconds"]), peak, work_of(record)))
    show(Table(["stage", ">time", ">memory at most", "work"], rows))


def work_of(record: dict) -> str:
    """What a stage says it did, in a few words."""
    units = {"encoded": "encoded", "steps": "steps", "drawn": "drawn", "decoded": "decoded"}
    units |= {"pairs": "pairs of noise and noise level, before and after"}
    return ", ".join(f"{record['outcome'][key]} {unit}" for key, unit in units.items() if key in record["outcome"])


def drawn(folder: Path) -> list[dict]:
    """The samples of a run: each prompt, and by series what plain image analysis sees, where a picture was drawn."""
    from PIL import Image

    from pipeline.plan.pictures import BASE, TRAINED
    from pipeline.plan.run_folder import RunFolder
    from pipeline.synthetic import score

    rows = json.loads(RunFolder(folder).samples_list.read_text())["pictures"]
    return [
        row | {name: score.look(Image.open(folder / row[name])) for name in (BASE, TRAINED) if name in row}
        for row in rows
    ]
