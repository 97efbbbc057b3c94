"""The demo behind ``make demo-controlnet``: a small FLUX.1 is taught to paint where an outline is, on CPU.

Everything it makes is in demo/ at the top of the repository.  Run again, it finds all of it done.
"""

import sys
import time

from steps import DEMO, ROOT, drawn, report_costs, say, show_and_run

EXPERIMENT = ROOT / "examples" / "outlines.toml"
OPTIONS = ("--experiment", "examples/outlines.toml")


def main() -> int:
    began = time.monotonic()
    draw()
    say("From pairs to a ControlNet and to what it draws, stage by stage; what is done already is not done again:")
    show_and_run("luigi", "--module", "tasks", "SampleControlNet", *OPTIONS)
    learned = report()
    print(f"\nDone in {time.monotonic() - began:.0f} s.")
    return 0 if learned else 1


def draw() -> None:
    """Draw what is not there yet: the pairs, and those that the training does not see."""
    pairs, unseen = DEMO / "outlines", DEMO / "unseen"
    if pairs.exists() and unseen.exists():
        return
    from pipeline.synthetic.shapes import UNSEEN, draw_pairs

    if not pairs.exists():
        draw_pairs(pairs)
        say(f"Drawn: {len(list(pairs.glob('*.png')))} pictures, each with its outline as its condition.")
        print(f"  {pairs.relative_to(ROOT)}/")
    if not unseen.exists():
        draw_pairs(unseen, 12, seed=UNSEEN)


def report() -> bool:
    """Say what was made, what it cost and what to type next.  Returns whether the ControlNet obeys its condition."""
    from pipeline.methods import CONTROLNET
    from pipeline.plan.plan import resolve
    from pipeline.settings.reading import load_experiment

    plan = resolve(load_experiment(EXPERIMENT), CONTROLNET)
    folder = plan.run.path
    latents = [need.entries.path for need in (*plan.image_needs, *plan.control_needs)]
    report_costs(plan.pooled.path, plan.txt.path, *latents, folder)
    obeys = report_overlap(drawn(folder), list(plan.experiment.sample_conditions.values()))
    say("What else to type:")
    print("  source .venv/bin/activate")
    print("  # a LoRA on the same pictures: nothing is encoded again")
    print("  luigi --module tasks TrainLoRA", *OPTIONS)
    print("  # your own pairs: see docs/first-controlnet.md")
    return obeys


def report_overlap(rows: list[dict], outlines: list) -> bool:
    """Say how far what is drawn covers what its outline encloses.  Returns whether that is most of it."""
    import numpy as np
    from PIL import Image

    from pipeline.synthetic import score

    inside = [score.enclosed(Image.open(path)) for path in outlines]
    say("Overlap of what is drawn with what the outline encloses (intersection over union), from the same noise:")
    means = {}
    for series, words in (("base", "without the ControlNet"), ("trained", "with it")):
        if series not in rows[0]:
            continue
        each = [score.overlap(row[series].mask, own) for row, own in zip(rows, inside)]
        means[series] = np.mean(each)
        print(f"  {means[series]:.2f} {words}: {', '.join(f'{one:.2f}' for one in each)}")
    if means["trained"] <= 0.5:
        print("  that is too little: the ControlNet did not learn", file=sys.stderr)
    return means["trained"] > 0.5


if __name__ == "__main__":
    sys.exit(main())
