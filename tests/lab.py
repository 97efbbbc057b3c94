"""A small experiment on disk for tests: pictures, a tiny checkpoint, an experiment file, and the stages run on them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cache import Entries
from pipeline import stages
from pipeline.methods import LORA
from pipeline.plan.plan import Plan, resolve
from pipeline.settings.experiment import Experiment
from pipeline.settings.reading import load_experiment
from pipeline.synthetic import shapes

ENCODERS = ("EncodeCLIP", "EncodeT5", "EncodeImages")


class Lab:
    """``settings`` are TOML lines by table; a lab can be copied to start again from the same state."""

    def __init__(self, folder: Path, model: Path, num_pictures: int = 3):
        self.folder, self.model = Path(folder), Path(model)
        shapes.draw_shapes(self.folder / "pictures", num_pictures, size=48)
        self.settings = {
            "paths": {"store": "store", "runs": "runs"},
            "model": {"path": str(model)},
            "data": {"images": "pictures", "resolution": 32, "max_sequence_length": 16},
            "lora": {"rank": 4},
            "train": {"steps": 3, "batch_size": 2, "learning_rate": 1e-3},
        }
        self.write()
        self.settle()

    def copy(self, folder: Path, own_model: bool = False) -> "Lab":
        shutil.copytree(self.folder, folder)
        other = object.__new__(Lab)
        other.folder, other.model = Path(folder), self.model
        other.settings = json.loads(json.dumps(self.settings))
        if own_model:
            other.model = Path(folder) / "model"
            shutil.copytree(self.model, other.model)
        other.set("model", path=str(other.model))
        other.settle()
        return other.run("CheckData")

    def set(self, table: str, **values) -> "Lab":
        self.settings.setdefault(table, {}).update(values)
        self.write()
        return self

    def write(self) -> None:
        lines = ['name = "lab"']
        for table, values in self.settings.items():
            lines += [f"[{table}]"] + [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.path.write_text("\n".join(lines) + "\n")

    def settle(self) -> None:
        """Make every input older than the few seconds in which a file is too new to be remembered."""
        past = time.time() - 3600
        for root in (self.pictures, self.model):
            for path in root.rglob("*"):
                if path.stat().st_mtime > past + 1800:
                    os.utime(path, (past, past))

    def rename_photos(self) -> None:
        """Give every photo another name, so that their order by name is the reverse."""
        rows = self.captions()
        for number, row in enumerate(rows):
            name = f"{chr(ord('z') - number)}.png"
            (self.pictures / row["file_name"]).rename(self.pictures / name)
            row["file_name"] = name
        self.write_captions(rows[::-1])
        self.settle()

    @property
    def path(self) -> Path:
        return self.folder / "lab.toml"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def experiment(self) -> Experiment:
        return load_experiment(self.path)

    @property
    def plan(self) -> Plan:
        return resolve(self.experiment, LORA)

    @property
    def latents(self) -> Entries:
        """Of the first variant: the only one, unless the experiment asks for more."""
        plan = self.plan
        return plan.image_needs[0].entries

    @property
    def run_folder(self) -> Path:
        plan = self.plan
        return plan.run.path

    def run(self, *names: str) -> "Lab":
        for name in names:
            stages.run(name, self.experiment)
        return self

    def run_process(self, name: str) -> "Lab":
        """Run a stage as the scheduler does, in a process of its own."""
        self.said(name)
        return self

    def said(self, name: str) -> str:
        """What a stage says that runs in a process of its own."""
        command = [sys.executable, "-m", "pipeline", "run", name, "--experiment", str(self.path)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def encode(self) -> dict[str, int]:
        """Run what a scheduler would: the encode stages that are not done.  Returns how many entries each wrote."""
        self.run("CheckData")
        written = {}
        for name in ENCODERS:
            if not stages.is_done(name, stages.Survey(self.experiment)):
                self.run(name)
                written[name] = self.record(name)["outcome"]["encoded"]
        return written

    def forget_files(self) -> "Lab":
        """Lose the memory of file digests, as a store does that comes to another machine."""
        (self.folder / "store/facts.sqlite").unlink()
        return self

    def made(self) -> dict[Path, tuple]:
        """Every file of the runs, with its bytes and when they were written."""
        files = [path for path in (self.folder / "runs").rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    def done(self, name: str) -> bool:
        return stages.is_done(name, stages.Survey(self.experiment))

    def record(self, name: str) -> dict:
        plan = self.plan
        folders = {"EncodeCLIP": plan.pooled.path, "EncodeT5": plan.txt.path, "EncodeImages": self.latents.path}
        return json.loads((folders.get(name, self.run_folder) / "records" / f"{name}.json").read_text())

    def captions(self) -> list[dict]:
        return [json.loads(line) for line in (self.pictures / "metadata.jsonl").read_text().splitlines()]

    def write_captions(self, rows: list[dict]) -> None:
        (self.pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
