"""The pictures that an experiment asks for: their prompts and noise, the addresses of their latents, their files.

Imports no MindSpore: the scheduler asks here what is there already.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cache import Entries, canonical, caption_item, digest
from pipeline.data import conditions, indexing
from pipeline.data.variants import Variant
from pipeline.errors import UserError
from pipeline.flux import pretrained
from pipeline.plan.method import Method
from pipeline.settings.experiment import Experiment

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

SCHEMA = 1
"""Bump when the sampling code may draw other latents from the same recipe; all pictures are then drawn again."""

BASE, TRAINED, CONDITION, STEPS = "base", "trained", "condition", "steps"
STEP = "step-"
"""What the names of series of steps begin with, and no other."""

SMALLEST_SHOWN, LARGEST_SHOWN = 192, 512
"""Sides of a picture in the grid of all, in pixels: smaller ones are enlarged by a whole factor, larger ones shrunk."""


@dataclass(frozen=True)
class Picture:
    """One picture to be drawn.  condition: the image that it is conditioned on, where the method reads one."""

    number: int
    prompt: str
    seed: int
    condition: indexing.IndexedPhoto | None = None


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.  batch_size: so many at a time, which changes them by rounding only."""

    size: Variant
    num_inference_steps: int
    guidance_scale: float
    batch_size: int


@dataclass(frozen=True)
class Series:
    """The pictures of one model and size, by the items of their final latents.

    name: BASE, TRAINED, that of a step, or another.  result: the folder of what is drawn with; None for the pretrained
    model as it is.
    """

    name: str
    drawing: Drawing
    entries: Entries
    pictures: dict[str, Picture] = field(repr=False)
    result: Path | None = None

    def missing(self) -> dict[str, Picture]:
        """What is still to be drawn."""
        return {item: self.pictures[item] for item in self.entries.missing(self.pictures)}

    def words(self, item: str) -> str:
        """What `python -m cache` calls a picture."""
        picture = self.pictures[item]
        return f"{picture.prompt} (seed {picture.seed}, {self.name})"


def check(experiment: Experiment, method: Method) -> None:
    """Raise UserError where the experiment file asks for no pictures, or for some that cannot be had."""
    settings = experiment.sample
    if not settings.prompts:
        raise UserError('sample.prompts: nothing to sample; name some, as prompts = ["a red circle"] in [sample]')
    if not method.reads_conditions:
        return
    if not settings.conditions:
        raise UserError(
            f"sample.conditions: a {method.label} needs an image file for each prompt; name them in [sample]"
        )
    gone = [name for name, path in experiment.sample_conditions.items() if not path.is_file()]
    if gone:
        raise UserError("\n  ".join(["sample.conditions: not there", *gone]))


def is_asked(experiment: Experiment, method: Method) -> bool:
    """Whether the experiment file asks for pictures of what it trains."""
    settings = experiment.sample
    return bool(settings.prompts) and (not method.reads_conditions or bool(settings.conditions))


def variant(plan: "Plan") -> Variant:
    """The size that pictures are drawn at, which is also what their conditions are encoded at."""
    side = plan.experiment.sample_resolution
    return Variant(side, side)


def drawing(plan: "Plan") -> Drawing:
    """How [sample] says that pictures are drawn."""
    settings = plan.experiment.sample
    return Drawing(variant(plan), settings.num_inference_steps, settings.guidance_scale, settings.batch_size)


# --- latents ------------------------------------------------------------------------------------------------------


def all_series(plan: "Plan") -> list[Series]:
    """What the experiment file asks for, the result's pictures last.  Raises UserError where there is no result yet."""
    return [*before_the_end(plan), trained(plan)]


def by_now(plan: "Plan") -> list[Series]:
    """The same, as far as it can be drawn by now."""
    return [*before_the_end(plan), *([trained(plan)] if plan.is_trained else [])]


def before_the_end(plan: "Plan") -> list[Series]:
    """The pretrained model's pictures, and those of each step of which the run has kept the weights."""
    settings, run = plan.experiment.sample, plan.run
    every = settings.every
    steps = [step for step in run.list_steps(plan.method.result_files) if step % every == 0] if every else []
    return [*([base(plan)] if settings.base else []), *(of_step(plan, step) for step in steps)]


def num_steps(experiment: Experiment, steps: int) -> int:
    """Of how many steps before the last one, of so many, pictures are drawn while the training goes on."""
    return (steps - 1) // experiment.sample.every if experiment.sample.every and experiment.sample.prompts else 0


def base(plan: "Plan") -> Series:
    """The pictures of the pretrained model as it is: the same for all experiments that ask for them."""
    return of_base(plan, BASE, drawing(plan), _pictures(plan))


def of_base(plan: "Plan", name: str, drawn: Drawing, pictures: Sequence[Picture]) -> Series:
    """Pictures of the pretrained model as it is."""
    entries = plan.entries(_recipe(plan, drawn, [plan.config(plan.family.network)]))
    return Series(name, drawn, entries, {_item(picture): picture for picture in pictures})


def trained(plan: "Plan") -> Series:
    """The pictures with the result of the run."""
    check_trained(plan, "to sample with")
    return _with_result(plan, TRAINED, plan.run.path)


def of_step(plan: "Plan", step: int) -> Series:
    """The pictures with the result as it was after a step, whose weights the run has kept."""
    return _with_result(plan, step_name(step), plan.run.step(step))


def _with_result(plan: "Plan", name: str, folder: Path) -> Series:
    """folder: that a method's files are in."""
    controls = [conditions.item(photo, variant(plan)) for photo in plan.sample_conditions]
    pictures = {_item(picture, *controls[picture.number : picture.number + 1]): picture for picture in _pictures(plan)}
    networks, drawn = [plan.config(plan.family.network), *plan.method.configs(plan, folder)], drawing(plan)
    recipe = _recipe(plan, drawn, networks) | plan.method.drawn_with(plan, folder)
    return Series(name, drawn, plan.entries(recipe), pictures, folder)


def step_name(step: int) -> str:
    """What the series of a step is called, with which file names are made."""
    return f"{STEP}{step:06}"


def check_trained(plan: "Plan", purpose: str) -> None:
    """Raise UserError where the run has no result yet, or one of a newer version.  purpose: what that is asked for."""
    if not plan.is_trained:
        label, stage = plan.method.label, plan.method.stages.train
        raise UserError(f"{plan.run.path}: there is no trained {label} {purpose} yet; run {stage} first")
    plan.run.read_result()


def _pictures(plan: "Plan") -> list[Picture]:
    settings, controls = plan.experiment.sample, plan.sample_conditions
    return [
        Picture(number, prompt, settings.seed + number, controls[number] if controls else None)
        for number, prompt in enumerate(settings.prompts)
    ]


def _item(picture: Picture, *control: str) -> str:
    """control: the address of its condition, where that is drawn with."""
    return digest(canonical({"caption": caption_item(picture.prompt), "seed": picture.seed, "control": control}))


def _recipe(plan: "Plan", drawn: Drawing, networks: list[dict]) -> dict:
    """All that decides a picture's final latents besides its item.  networks: configs of the models that predict."""
    policy = plan.policy(plan.family.network)
    doubled, height, width = plan.latents(drawn.size).shape
    return {
        "schema": SCHEMA,
        "kind": "samples",
        "dtype": "float32",
        "shape": [doubled // 2, height, width],
        "encoder": plan.network_digest,
        **policy.decisive,
        "txt": plan.txt.id,
        "pooled": plan.pooled.id,
        "scheduler": pretrained.working_config(plan.model_folder, "scheduler"),
        "num_inference_steps": drawn.num_inference_steps,
        "guidance_scale": drawn.guidance_scale if plan.family.is_guided(networks) else None,
    }


# --- files --------------------------------------------------------------------------------------------------------


def listing(plan: "Plan", several: Sequence[Series]) -> dict:
    """What samples.json says.  File names are relative to the run's folder, and as good as addresses."""
    settings = plan.experiment.sample
    return {
        "run_id": plan.run_id,
        "trained": plan.method.name,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": several[-1].entries.recipe["guidance_scale"],
        "resolution": plan.experiment.sample_resolution,
        "precision": asdict(plan.precision),
        "latents": {each.name: each.entries.id for each in several},
        "grid": plan.run.samples_grid.name,
        "pictures": rows(plan, several, file_names),
    }


def rows(plan: "Plan", several: Sequence[Series], names: Callable[["Plan", Series], list[str]]) -> list[dict]:
    """What samples.json says of each picture.  names: gives the files of a series, in the pictures' order."""
    files = {each.name: names(plan, each) for each in several}
    found = []
    for picture in several[-1].pictures.values():
        row: dict = {"prompt": picture.prompt, "seed": picture.seed}
        if picture.condition:
            row[CONDITION] = condition_name(plan, picture)
        row |= {name: files[name][picture.number] for name in (BASE, TRAINED) if name in files}
        steps = {str(int(name[len(STEP) :])): own[picture.number] for name, own in files.items() if STEP in name}
        found.append(row | ({STEPS: steps} if steps else {}))
    return found


def file_names(plan: "Plan", series: Series) -> list[str]:
    """The file of each picture, in their order; whatever decides its pixels is in its name."""
    component = plan.family.image_encoder
    decoder = plan.family.scaling(plan.config(component))
    decoder |= {"vae": plan.image_encoder_digest} | plan.policy(component).decisive
    keys = (canonical(decoder | {"recipe": series.entries.id, "item": item}) for item in series.pictures)
    folder = plan.run.samples.name
    return [f"{folder}/{number:03}-{series.name}-{digest(key)[:12]}.png" for number, key in enumerate(keys)]


def condition_name(plan: "Plan", picture: Picture) -> str:
    """The file that shows what a picture is conditioned on."""
    assert picture.condition is not None
    entries = plan.latents(variant(plan), plan.method.condition(plan.experiment))
    key = canonical([entries.id, conditions.item(picture.condition, variant(plan))])
    return f"{plan.run.samples.name}/{picture.number:03}-{CONDITION}-{digest(key)[:12]}.png"


def names_in(listing: dict) -> list[str]:
    """All files that samples.json names."""
    return [listing["grid"], *(name for row in listing["pictures"] for name in in_order(row, "").values())]


def in_order(row: dict, label: str) -> dict[str, str]:
    """The files of a row of samples.json by what is written beside them.  label: of what was trained."""
    steps = {f"step {step}": name for step, name in row.get(STEPS, {}).items()}
    found = {name: row[name] for name in (CONDITION, BASE) if name in row} | steps
    return found | ({f"with the {label}": row[TRAINED]} if TRAINED in row else {})
