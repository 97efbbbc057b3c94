"""``python -m benchmarks.fidelity``: what the embedded model draws, before and after it was taught, scored.

Real experiments through real stages, each precision by itself: a LoRA taught a new word for a new shape, sampled over
prompts with the new word and over prompts with the old ones, with and without it; and a ControlNet taught outlines.
What keeps the old words can be chosen: `[prior]`, as in the demo; drawn pictures of the old shapes among the photos,
as many as of the new one; or nothing.  No model judges a model: `pipeline.synthetic.score` looks at the pictures.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.methods import CONTROLNET, LORA
from pipeline.plan.pictures import BASE, TRAINED
from pipeline.plan.plan import resolve
from pipeline.plan.run_folder import RunFolder
from pipeline.settings.reading import load_experiment
from pipeline.synthetic import score, shapes

ROOT = Path(__file__).parents[1]
PRECISIONS = {
    "fp32": {"preset": "fp32"},
    "fp16": {"preset": "fp16"},
    "bf16, simulated": {"preset": "bf16", "simulate": True},
}
REMINDED_BY = ("prior", "photos", "nothing")
SIZE = 64
SAMPLE = {"num_inference_steps": 20, "batch_size": 20}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__.partition("\n")[0])
    parser.add_argument("--old", type=int, default=100, help="prompts that the model knows")
    parser.add_argument("--new", type=int, default=50, help="prompts with the new word")
    parser.add_argument("--outlines", type=int, default=50, help="conditions for the ControlNet; 0: no ControlNet")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="by default each")
    parser.add_argument("--reminded-by", choices=REMINDED_BY, default="prior", help="what keeps the old words (prior)")
    parser.add_argument("--folder", type=Path, help="keep everything there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        for name in options.precision or PRECISIONS:
            print(f"{name}:", flush=True)
            print(lora_lines(taught(folder, name, options.old, options.new, options.reminded_by)), flush=True)
            if options.outlines:
                print(control_lines(guided(folder, name, options.outlines)), flush=True)


def taught(folder: Path, precision: str, num_old: int, num_new: int, reminded_by: str = "prior") -> dict:
    """Shares of what is right, by ("old" or "new", "base" or "trained").  reminded_by: of `REMINDED_BY`."""
    new_words = {"cross": shapes.MADE_UP["cross"]}
    asked = [shapes.picture(shapes.UNSEEN, index, SIZE) for index in range(num_old)]
    asked += [shapes.picture(shapes.UNSEEN, index, SIZE, new_words) for index in range(num_new)]
    tables = read_example("blicket.toml") | {"precision": PRECISIONS[precision]}
    reminders = 20 if reminded_by == "photos" else 0
    tables["data"]["images"] = images = f"blickets-{reminders}"
    if not (folder / images).exists():
        shapes.draw_teaching(folder / images, "cross", reminders=reminders)
    if reminded_by != "prior":  # a step then has as many pictures as with both halves of its batches
        del tables["prior"]
        tables["train"]["batch_size"] *= 2
    tables["sample"] = SAMPLE | {"prompts": [picture.caption for picture in asked]}
    drawn = run(folder, "Sample", f"lora-{precision}-{reminded_by}", tables)
    found = {}
    for kind, part in (("old", slice(0, num_old)), ("new", slice(num_old, None))):
        for series in (BASE, TRAINED):
            found[kind, series] = score.shares([each[series] for each in drawn[part]], asked[part])
    return found


def guided(folder: Path, precision: str, count: int) -> dict[str, float]:
    """Mean overlap of what is drawn with what its outline encloses, "base" without the ControlNet."""
    if not (folder / "outlines").exists():
        shapes.draw_pairs(folder / "outlines")
    unseen = f"unseen-{count}"
    if not (folder / unseen).exists():
        shapes.draw_pairs(folder / unseen, count, seed=shapes.UNSEEN)
    rows = [json.loads(line) for line in (folder / unseen / "metadata.jsonl").read_text().splitlines()]
    outlines = [f"{unseen}/{row['conditioning_image']}" for row in rows]
    tables = read_example("outlines.toml") | {"precision": PRECISIONS[precision]}
    tables["data"]["images"] = "outlines"
    tables["sample"] = SAMPLE | {"prompts": [row["text"] for row in rows], "conditions": outlines}
    drawn = run(folder, "SampleControlNet", f"controlnet-{precision}", tables)
    inside = [score.enclosed(Image.open(folder / name)) for name in outlines]
    return {
        series: float(np.mean([score.overlap(score.look(each[series]).mask, own) for each, own in zip(drawn, inside)]))
        for series in (BASE, TRAINED)
    }


def read_example(name: str) -> dict:
    tables = tomllib.loads((ROOT / "examples" / name).read_text())
    return tables | {"paths": {"store": "store", "runs": "runs"}}


def run(folder: Path, task: str, name: str, tables: dict) -> list[dict[str, Image.Image]]:
    """Sample through Luigi.  Returns each prompt's pictures by series."""
    path = folder / f"{name.replace(', ', '-')}.toml"
    path.write_text(as_toml(tables))
    command = [sys.executable, "-m", "luigi", "--module", "tasks", task, "--experiment", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    plan = resolve(load_experiment(path), CONTROLNET if task == "SampleControlNet" else LORA)
    run_folder = plan.run.path
    rows = json.loads(RunFolder(run_folder).samples_list.read_text())["pictures"]
    return [{series: Image.open(run_folder / row[series]) for series in (BASE, TRAINED)} for row in rows]


def as_toml(tables: dict) -> str:
    plain = "".join(f"{key} = {json.dumps(value)}\n" for key, value in tables.items() if not isinstance(value, dict))
    return plain + "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
        if isinstance(table, dict)
    )


def lora_lines(found: dict) -> str:
    lines = [f"  {'':<28}{'colour':>8}{'background':>12}{'shape':>8}"]
    for (kind, series), row in found.items():
        label = f"{kind} words, {'with the LoRA' if series == 'trained' else 'base'}"
        lines.append(f"  {label:<28}{row['colour']:>8.0%}{row['background']:>12.0%}{row['shape']:>8.0%}")
    return "\n".join(lines)


def control_lines(found: dict) -> str:
    return f"  overlap with the outline: {found['trained']:.2f} with the ControlNet, {found['base']:.2f} without"


if __name__ == "__main__":
    main()
