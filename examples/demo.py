"""The demo behind ``make demo``: a small FLUX.1 is taught what a blicket is, by a LoRA, on this machine's CPU.

Everything it makes is in demo/ at the top of the repository.  Run again, it finds all of it done.
"""

import sys
import time

from steps import DEMO, ROOT, drawn, report_costs, say, show_and_run

EXPERIMENT = ROOT / "examples" / "blicket.toml"
SHAPE = "cross"
OPTIONS = ("--experiment", "examples/blicket.toml")


def main() -> int:
    began = time.monotonic()
    if not (DEMO / "blickets").exists():
        from pipeline.synthetic.shapes import draw_teaching

        folder = draw_teaching(DEMO / "blickets", SHAPE)
        say("Drawn and captioned: 20 crosses, called blickets.")
        print(f"  {folder.relative_to(ROOT)}/")
    say("From pictures to a LoRA and to what it draws, stage by stage; what is done already is not done again:")
    show_and_run("luigi", "--module", "tasks", "Sample", *OPTIONS)
    learned = report()
    print(f"\nDone in {time.monotonic() - began:.0f} s.")
    return 0 if learned else 1


def report() -> bool:
    """Say what was made, what it cost and what to type next.  Returns whether the model learned the word."""
    from pipeline.methods import LORA
    from pipeline.plan.plan import resolve
    from pipeline.settings.reading import load_experiment

    plan = resolve(load_experiment(EXPERIMENT), LORA)
    folder, latents = plan.run.path, plan.image_needs[0].entries
    report_costs(plan.pooled.path, plan.txt.path, latents.path, folder)
    learned = report_pictures(drawn(folder))
    say("What else to type:")
    print("  source .venv/bin/activate")
    print("  # change learning_rate in examples/blicket.toml; this trains and draws again and encodes nothing:")
    print("  luigi --module tasks Sample", *OPTIONS)
    print("  # your own photos, NAME.txt beside NAME.jpg: see docs/first-lora.md")
    return learned


def report_pictures(rows: list[dict]) -> bool:
    """Say what is seen in each picture.  Returns whether most with the new word show the new shape, and only then."""
    from cache.terminal.output import show
    from cache.terminal.table import Table
    from pipeline.synthetic.shapes import MADE_UP

    word = MADE_UP[SHAPE]
    say("What plain image analysis sees in the pictures, from the same noise:")
    seen = [(row["prompt"], described(row.get("base")), described(row["trained"])) for row in rows]
    show(Table(["asked for", "base", "with the LoRA"], seen))
    new = [row for row in rows if word in row["prompt"]]
    if not new or "base" not in new[0]:
        print(f"  to count what it learned, ask for a {word}, and let [sample] base be true")
        return True
    before, after = (sum(row[series].shape == SHAPE for row in new) for series in ("base", "trained"))
    print(f"  crosses where a {word} is asked for: {before} of {len(new)} before, {after} of {len(new)} after")
    if 2 * after <= len(new):
        print("  that is no clear gain: the model did not learn", file=sys.stderr)
    return 2 * after > len(new)


def described(seen) -> str:
    if seen is None:
        return "not drawn"
    return f"{seen.colour or 'some colour'} {seen.shape or 'something'} on {seen.background or 'some colour'}"


if __name__ == "__main__":
    sys.exit(main())
