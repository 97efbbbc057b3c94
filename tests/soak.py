"""``python tests/soak.py``: two experiments, a collector and a verifier on one store, and someone who kills them.

Each experiment is trained by Luigi again and again, every time with other captions and one more picture, so that there
is always something to encode and something that nobody needs any more.  A process is killed every few seconds: Luigi,
one of its stages, ``cache gc --yes`` or ``cache verify``, by SIGKILL, SIGTERM or SIGINT.  What must not be:

    failed       a run of Luigi, the collector or the verifier that ended with an error although nothing killed it
    tracebacks   with a line of ours; Luigi ends with one of its own at Ctrl-C before it has loaded our tasks
    damage       found by a verifier
    orphans      processes that outlived their Luigi
    differs      the last LoRA of each experiment, made once more alone on a store of its own, is another

Ends with 1 where there is any.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from commands import ROOT, command, environment, stages_under
from lab import Lab

from pipeline.methods.lora_layers import WEIGHTS_NAME

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
YOUNG = "1m"
"""What the collector leaves alone: an experiment may be changed while it looks."""


@dataclass
class Soak:
    folder: Path
    ends: float
    rng: random.Random
    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    running: dict[str, subprocess.Popen] = field(default_factory=dict)
    hit: set[int] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.ends

    def run(self, name: str, arguments: list[str]) -> bool:
        """Run a command to its end, or until it is killed.  Returns whether it did its work."""
        process = subprocess.Popen(
            arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder
        )
        self.running[name] = process
        said = process.communicate()[0]
        del self.running[name]
        was_hit = process.pid in self.hit
        self.counts[f"{name} {'ended' if process.returncode == 0 else 'stopped' if was_hit else 'failed'}"] += 1
        is_ours = any(f"{ROOT}/{package}/" in said for package in ("cache", "pipeline", "tasks"))
        if ("Traceback" in said and is_ours) or (process.returncode and not was_hit):
            self.faults.append(f"{name} ended with {process.returncode}:\n{said[-3000:]}")
        return process.returncode == 0

    def train(self, name: str, lab: Lab) -> None:
        turn = 0
        while not self.is_over:
            change(lab, turn)
            while not self.is_over and not self.run(f"luigi {name}", command("TrainLoRA", lab)):
                pass
            self.counts[f"trainings of {name}"] += not self.is_over
            turn += 1
        self.run(f"luigi {name}", command("TrainLoRA", lab))  # nobody kills any more

    def tool(self, name: str, *arguments: str) -> None:
        while not self.is_over:
            self.run(name, [sys.executable, "-m", "cache", name, *arguments])
            time.sleep(self.rng.uniform(0, 2))

    def kill(self) -> None:
        while not self.is_over:
            time.sleep(self.rng.uniform(2, 10))
            name, process = self.rng.choice(list(self.running.items()) or [("", None)])
            if process is None or self.is_over:
                continue
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                stages = stages_under(process.pid)
                pid = self.rng.choice([process.pid, *stages * 2])
                which = self.rng.choice(SIGNALS)
                self.hit.add(process.pid)
                os.kill(pid, which)
                whom = "a stage" if pid in stages else name.partition(" ")[0]
                self.counts[f"killed: {whom} by {which.name}"] += 1


def change(lab: Lab, turn: int) -> None:
    """Other captions, and one of the pictures another one."""
    rows = [row | {"text": f"picture {number} of turn {turn}"} for number, row in enumerate(lab.captions())]
    lab.write_captions(rows)
    path = lab.pictures / rows[turn % len(rows)]["file_name"]
    from PIL import Image, ImageOps

    ImageOps.mirror(Image.open(path)).rotate(90 * (turn % 4)).save(path)


def again_alone(lab: Lab, folder: Path) -> bytes:
    """The LoRA that the same experiment gives undisturbed, on a store of its own."""
    alone = lab.copy(folder)
    alone.set("paths", store=str(folder / "own-store"), runs=str(folder / "own-runs"))
    subprocess.run(command("TrainLoRA", alone), env=environment(), check=True, capture_output=True)
    return (alone.run_folder / WEIGHTS_NAME).read_bytes()


def soak(folder: Path, seconds: float, seed: int) -> int:
    from pipeline.devices import device
    from pipeline.flux import tiny

    device.use("CPU")
    model = tiny.write_tiny_model(folder / "model")
    labs = {}
    for number, name in enumerate(("one", "two")):
        lab = labs[name] = Lab(folder / name, model, num_pictures=4 + number)
        lab.set("paths", store=str(folder / "store"), runs=str(folder / "runs"))
        lab.set("train", steps=12, checkpoint_every=2).run("CheckData", "EncodeImages")
    running = Soak(folder, time.monotonic() + seconds, random.Random(seed))
    files = [str(lab.path) for lab in labs.values()]
    threads = [threading.Thread(target=running.train, args=item) for item in labs.items()]
    threads += [
        threading.Thread(target=running.tool, args=("gc", *files, "--older-than", YOUNG, "--yes")),
        threading.Thread(target=running.tool, args=("verify", str(folder / "store"))),
        threading.Thread(target=running.kill),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.run("verify", [sys.executable, "-m", "cache", "verify", str(folder / "store")])
    for name, lab in labs.items():
        if again_alone(lab, folder / f"{name}-alone") != (lab.run_folder / WEIGHTS_NAME).read_bytes():
            running.faults.append(f"the LoRA of {name} is another than the one made alone")
    left = subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True).stdout.splitlines()
    running.faults += [f"still there: {line}" for line in left if "soak.py" not in line]
    print(json.dumps(dict(sorted(running.counts.items())), indent=2))
    print("\n\n".join(running.faults) or "no fault")
    return int(bool(running.faults))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    status = soak(folder, 60 * options.minutes, options.seed)
    if not status:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
