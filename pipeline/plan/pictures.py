"""The pictures that an experiment asks for: their prompts and noise, the addresses of their latents, their files.

Imports no MindSpore: the scheduler asks here what is there already.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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

BASE, TRAINED, CONDITION = "base", "trained", "condition"
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
    """The pictures of one model and size, by the items of their final latents.  name: BASE, TRAINED, or another."""

    name: str
    drawing: Drawing
    entries: Entries
    pictures: dict[str, Picture] = field(repr=False)

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
    """What the experiment file asks for.  Raises UserError where the training has not ended."""
    return [*([base(plan)] if plan.experiment.sample.base else []), trained(plan)]


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
    controls = [conditions.item(photo, variant(plan)) for photo in plan.sample_conditions]
    pictures = {_item(picture, *controls[picture.number : picture.number + 1]): picture for picture in _pictures(plan)}
    networks, drawn = [plan.config(plan.family.network), *plan.method.configs(plan)], drawing(plan)
    recipe = _recipe(plan, drawn, networks) | plan.method.drawn_with(plan)
    return Series(TRAINED, drawn, plan.entries(recipe), pictures)


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


def listing(plan: "Plan") -> dict:
    """What samples.json says.  File names are relative to the run's folder, and as good as addresses."""
    several, settings = all_series(plan), plan.experiment.sample
    files = {each.name: file_names(plan, each) for each in several}
    rows = []
    for picture in several[-1].pictures.values():
        row = {"prompt": picture.prompt, "seed": picture.seed}
        if picture.condition:
            row[CONDITION] = condition_name(plan, picture)
        rows.append(row | {name: files[name][picture.number] for name in files})
    return {
        "run_id": plan.run_id,
        "trained": plan.method.name,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": several[-1].entries.recipe["guidance_scale"],
        "resolution": plan.experiment.sample_resolution,
        "precision": asdict(plan.precision),
        "latents": {each.name: each.entries.id for each in several},
        "grid": plan.run.samples_grid.name,
        "pictures": rows,
    }


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
    rows = [row[name] for row in listing["pictures"] for name in (CONDITION, BASE, TRAINED) if name in row]
    return [listing["grid"], *rows]
