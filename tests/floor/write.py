"""Write lab.tar.gz: a small store, finished runs of each method with their pictures, and interrupted ones.

    python tests/floor/write.py

It was written once, by the version of 2026-11-28; test_floor.py holds every later version to it.  Write it anew only
where CHANGELOG says "You will re-encode" or "You will train again", and by the last version before the change: then add
it beside the old one.
"""

import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from floor_lab import LAB, SETTINGS, write_model  # noqa: E402
from lab import Lab  # noqa: E402
from pairs import add_conditions  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline import stage_table  # noqa: E402
from pipeline.devices import device  # noqa: E402

ENCODE = ("GetModel", "CheckData", "CheckControls", "EncodeCLIP", "EncodeT5", "EncodeImages", "EncodeControls")
TRAIN = ("TrainLoRA", "TrainControlNet")
DRAW = ("SampleLatents", "SampleControlNetLatents", "Sample", "SampleControlNet")


def main() -> None:
    device.use("CPU")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        finished = Lab(folder / "finished", write_model(folder / "model"))
        add_conditions(finished, lambda picture: Image.eval(picture, lambda value: 255 - value))
        finished.settings = json.loads(json.dumps(SETTINGS))
        finished.write()
        finished.run(*ENCODE)
        interrupted = folder / "interrupted"
        shutil.copytree(finished.folder, interrupted)
        finished.run(*TRAIN, *DRAW)
        shutil.copytree(finished.folder / "runs", interrupted / "runs")
        for run in (finished.folder / "runs").iterdir():
            shutil.rmtree(run / "checkpoints")
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
        for run in (interrupted / "runs").iterdir():
            _interrupt(run)
        with tarfile.open(LAB, "w:gz") as tar:
            for each in (finished.folder, interrupted):
                if each == interrupted:  # its photos and entries are those of the finished one
                    tar.add(each / "runs", "interrupted/runs")
                else:
                    tar.add(each, each.name, filter=_without_facts)


def _interrupt(run: Path) -> None:
    """What a kill after the first checkpoint leaves."""
    for name in ("samples", "tensorboard", "records", "controlnet"):
        shutil.rmtree(run / name, ignore_errors=True)
    for path in run.iterdir():
        if path.is_file() and path.name not in ("experiment.json", "needs.json", "metrics.jsonl"):
            path.unlink()
    newest = max((run / "checkpoints").iterdir())
    newest.unlink()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002.safetensors"], run


def _without_facts(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """What is known of files is of this machine; locks are of nobody."""
    is_left_out = "facts.sqlite" in info.name or info.name.endswith((".lock", "/leases"))
    return None if is_left_out else info


if __name__ == "__main__":
    main()
    print(f"{LAB}: {LAB.stat().st_size / 1e6:.2f} MB; stages known: {', '.join(stage_table.STAGES)}")
