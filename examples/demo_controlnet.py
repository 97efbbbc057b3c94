"""The demo behind ``make demo-controlnet``: circles taught from their outlines, with a tiny FLUX.1, on CPU.

Everything it makes is in demo/ at the top of the repository.  Run again, it finds all of it done.
"""

import json
import sys
import time

from steps import DEMO, ROOT, report_costs, say, show_and_run

EXPERIMENT = ROOT / "examples" / "circles.toml"
NUM_PAIRS = 12


def main() -> int:
    from pipeline.shapes import draw_pairs

    began = time.monotonic()
    if not (DEMO / "circles").exists():
        say(f"{NUM_PAIRS} filled circles, each with its outline as its condition:")
        folder = draw_pairs(DEMO / "circles", NUM_PAIRS, size=128, words={"circle": "circle"})
        print(f"  {folder.relative_to(ROOT)}/")
    if not (DEMO / "model").exists():
        say("A tiny, untrained checkpoint in FLUX.1 format:")
        show_and_run(sys.executable, "-m", "pipeline", "tiny-model", "demo/model")
    say("From pairs to a ControlNet, stage by stage; what is done already is not done again:")
    options = ("--local-scheduler", "--experiment", "examples/circles.toml")
    show_and_run("luigi", "--module", "tasks", "MeasureControlNet", *options)
    learned = report()
    print(f"\nDone in {time.monotonic() - began:.0f} s.")
    return 0 if learned else 1


def report() -> bool:
    """Say what was made, what it cost and what to type next.  Returns whether the ControlNet obeys its condition."""
    from pipeline.experiment import load_experiment
    from pipeline.recipes import CONTROLNET, resolve

    plan = resolve(load_experiment(EXPERIMENT), CONTROLNET)
    photos = plan.photos()
    folder = plan.run_folder(photos)
    report_costs(plan.pooled.path, plan.txt.path, plan.image_needs(photos)[0].entries.path, folder)
    loss = json.loads((folder / "loss.json").read_text())
    say(f"Mean loss over {loss['pairs']} fixed pairs of noise and noise level on these pictures:")
    print(f"  {loss['before']:.3f} without the ControlNet")
    print(f"  {loss['after']:.3f} with it")
    print(f"  {loss['with_other_conditions']:.3f} with it, but given the outline of another picture")
    obeys = loss["gain"] > 3 * loss["standard_error"] and loss["with_other_conditions"] > loss["after"]
    if not obeys:
        print("  that is no clear gain: the ControlNet did not learn", file=sys.stderr)
    say(f"What it made, in {folder.relative_to(ROOT)}/:")
    print("  controlnet/      config and weights, as FluxControlNetModel.from_pretrained takes them")
    print("  metrics.jsonl    loss and step time of every step")
    say("What to type next:")
    print("  source .venv/bin/activate")
    print("  # a LoRA on the same pictures: nothing is encoded again")
    print("  luigi --module tasks TrainLoRA --local-scheduler --experiment examples/circles.toml")
    print("  # your own pairs: see 'A ControlNet' in README.md")
    return obeys


if __name__ == "__main__":
    sys.exit(main())
