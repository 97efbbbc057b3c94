"""The demo behind ``make demo-photos``: a LoRA on five crops of a cat's photo, a tiny FLUX.1 of random weights, on CPU.

Everything it makes is in demo/ at the top of the repository.  Run again, it finds all of it done.
"""

import json
import sys
import time
from pathlib import Path

from steps import DEMO, ROOT, report_costs, say, show_and_run

EXPERIMENT = ROOT / "examples" / "cat.toml"

CROPS = {
    # name: (caption, left, top, side), in pixels of the 451 x 300 photo
    "face": ("a photo of Chelsea the cat", 60, 0, 300),
    "left": ("a photo of Chelsea the cat from the left", 0, 20, 260),
    "right": ("a photo of Chelsea the cat on the right", 190, 30, 260),
    "eyes": ("a close up of the eyes of Chelsea the cat", 110, 60, 180),
    "nose": ("a close up of the nose of Chelsea the cat", 150, 100, 170),
}


def main() -> int:
    began = time.monotonic()
    write_photos(DEMO / "photos")
    if not (DEMO / "model").exists():
        say("A tiny, untrained checkpoint in FLUX.1 format:")
        show_and_run(sys.executable, "-m", "pipeline", "tiny-model", "demo/model")
    say("From photos to a LoRA, stage by stage; what is done already is not done again:")
    show_and_run("luigi", "--module", "tasks", "MeasureLoss", "--experiment", "examples/cat.toml")
    learned = report()
    print(f"\nDone in {time.monotonic() - began:.0f} s.")
    return 0 if learned else 1


def write_photos(folder: Path) -> None:
    """Crop the cat that scikit-image ships (photo: Stefan van der Walt, CC0).  The list of captions is written last."""
    if (folder / "metadata.jsonl").exists():
        return
    from PIL import Image
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    photo, lines = Image.fromarray(data.chelsea()), []
    for name, (caption, left, top, side) in CROPS.items():
        photo.crop((left, top, left + side, top + side)).save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    say(f"Five crops of a real photo: {folder.relative_to(ROOT)}/")


def report() -> bool:
    """Say what was made, what it cost and what to type next.  Returns whether the model learned."""
    from pipeline.methods import LORA
    from pipeline.plan.plan import resolve
    from pipeline.settings.reading import load_experiment

    plan = resolve(load_experiment(EXPERIMENT), LORA)
    folder, latents = plan.run.path, plan.image_needs[0].entries
    report_costs(plan.pooled.path, plan.txt.path, latents.path, folder)
    learned = report_loss(json.loads((folder / "loss.json").read_text()))
    say("What else to type:")
    print("  source .venv/bin/activate")
    print("  # change learning_rate in examples/cat.toml; this trains again and encodes nothing:")
    print("  luigi --module tasks TrainLoRA --experiment examples/cat.toml")
    print("  # your own photos, NAME.txt beside NAME.jpg: see docs/first-lora.md")
    return learned


def report_loss(loss: dict) -> bool:
    errors = loss["gain"] / loss["standard_error"]
    say(f"Mean loss over {loss['pairs']} fixed pairs of noise and noise level on these photos:")
    print(f"  {loss['before']:.3f} before training, {loss['after']:.3f} after:", end=" ")
    print(f"falls by {loss['gain']:.3f}, which is {errors:.1f} standard errors of the paired difference")
    if errors <= 3:
        print("  that is no clear gain: the model did not learn", file=sys.stderr)
    return errors > 3


if __name__ == "__main__":
    sys.exit(main())
