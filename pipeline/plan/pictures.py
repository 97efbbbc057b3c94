"""What is to be drawn with a trained model, and without it: pictures, the addresses of their latents, their files.

Imports no MindSpore: the scheduler asks here what is there already.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cache import Entries, canonical, caption_item, digest
from pipeline.data import conditions, indexing
from pipeline.data.variants import Variant
from pipeline.errors import UserError
from pipeline.flux import checkpoints
from pipeline.methods import controlnet, lora
from pipeline.plan.plan import CONTROLNET, LORA, RESULT_NAME, ImageNeed, Plan
from pipeline.settings.fields import Experiment

SCHEMA = 1
"""Bump when the sampling code may draw other latents from the same recipe; all pictures are then drawn again."""

BASE, TRAINED, CONDITION = "base", "trained", "condition"
RESULTS = {LORA: (lora.WEIGHTS_NAME,), CONTROLNET: (controlnet.WEIGHTS_NAME, controlnet.CONFIG_NAME)}
FOLDER, GRID_NAME, LIST_NAME = "samples", "samples.png", "samples.json"


@dataclass(frozen=True)
class Picture:
    """One picture to be drawn.  condition: of its ControlNet; None where it has none."""

    number: int
    prompt: str
    seed: int
    condition: indexing.IndexedPhoto | None = None


@dataclass(frozen=True)
class Series:
    """The pictures of one model, BASE or TRAINED, by the items of their final latents."""

    name: str
    entries: Entries
    pictures: dict[str, Picture] = field(repr=False)

    def missing(self) -> dict[str, Picture]:
        """What is still to be drawn."""
        return {item: self.pictures[item] for item in self.entries.missing(self.pictures)}

    def words(self, item: str) -> str:
        """What a picture is called by people who look into the store."""
        picture = self.pictures[item]
        return f"{picture.prompt} (seed {picture.seed}, {self.name})"


def check(experiment: Experiment, trains: str) -> None:
    """Raise UserError where the experiment file asks for no pictures, or for some that cannot be had."""
    settings = experiment.sample
    if not settings.prompts:
        raise UserError('sample.prompts: nothing to sample; name some, as prompts = ["a red circle"] in [sample]')
    if trains != CONTROLNET:
        return
    if not settings.conditions:
        raise UserError("sample.conditions: a ControlNet needs an image file for each prompt; name them in [sample]")
    gone = [name for name, path in experiment.sample_conditions.items() if not path.is_file()]
    if gone:
        raise UserError("\n  ".join(["sample.conditions: not there", *gone]))


def is_asked(experiment: Experiment, trains: str) -> bool:
    """Whether the experiment file asks for pictures of what it trains."""
    settings = experiment.sample
    return bool(settings.prompts) and (trains != CONTROLNET or bool(settings.conditions))


def is_trained(folder: Path, trains: str) -> bool:
    """Whether a run's training has ended and all that it made is there.  trains: as of `Plan`."""
    return all((folder / name).is_file() for name in (RESULT_NAME, *RESULTS[trains]))


def variant(plan: Plan) -> Variant:
    """The size that pictures are drawn at, which is also what their conditions are encoded at."""
    side = plan.experiment.sample_resolution
    return Variant(side, side)


def control_needs(plan: Plan, photos: Sequence[indexing.IndexedPhoto]) -> list[ImageNeed]:
    """`Plan.control_needs`, and what sampling needs besides."""
    needs, own = {need.variant: need for need in plan.control_needs(photos)}, variant(plan)
    if plan.sample_conditions:
        found = {conditions.item(photo, own): photo for photo in plan.sample_conditions}
        found |= dict(zip(needs[own].items, needs[own].photos)) if own in needs else {}
        entries = plan.latents(own, plan.experiment.controlnet.condition)
        needs[own] = ImageNeed(own, entries, tuple(found), tuple(found.values()))
    return list(needs.values())


# --- latents ------------------------------------------------------------------------------------------------------


def all_series(plan: Plan, photos: Sequence[indexing.IndexedPhoto]) -> list[Series]:
    """What the experiment file asks for.  Raises UserError where the training has not ended."""
    return [*([base(plan)] if plan.experiment.sample.base else []), trained(plan, photos)]


def base(plan: Plan) -> Series:
    """The pictures of the checkpoint as it is: the same for all experiments that ask for them."""
    networks = [checkpoints.config(plan.checkpoint, "transformer")]
    pictures = {_item(picture): picture for picture in _pictures(plan)}
    return Series(BASE, plan.store.entries(_recipe(plan, networks)), pictures)


def trained(plan: Plan, photos: Sequence[indexing.IndexedPhoto]) -> Series:
    """The pictures with the run's LoRA or ControlNet."""
    folder = plan.run_folder(photos)
    if not is_trained(folder, plan.trains):
        name = "ControlNet" if plan.trains == CONTROLNET else "LoRA"
        raise UserError(f"{folder}: there is no trained {name} to sample with yet; run Train{name} first")
    networks = [checkpoints.config(plan.checkpoint, "transformer")]
    if plan.trains == CONTROLNET:
        networks.append(checkpoints.config(folder / controlnet.FOLDER, checkpoints.CONTROLNET))
    controls = [conditions.item(photo, variant(plan)) for photo in plan.sample_conditions]
    pictures = {_item(picture, *controls[picture.number : picture.number + 1]): picture for picture in _pictures(plan)}
    recipe = _recipe(plan, networks) | _recipe_of_trained(plan, folder)
    return Series(TRAINED, plan.store.entries(recipe), pictures)


def _pictures(plan: Plan) -> list[Picture]:
    settings, controls = plan.experiment.sample, plan.sample_conditions
    return [
        Picture(number, prompt, settings.seed + number, controls[number] if controls else None)
        for number, prompt in enumerate(settings.prompts)
    ]


def _item(picture: Picture, *control: str) -> str:
    """control: the address of its condition, where that is drawn with."""
    return digest(canonical({"caption": caption_item(picture.prompt), "seed": picture.seed, "control": control}))


def _recipe(plan: Plan, networks: list[dict]) -> dict:
    """All that decides a picture's final latents besides its item.  networks: configs of the models that predict."""
    settings, policy, own = plan.experiment.sample, plan.precision.transformer, variant(plan)
    doubled, height, width = plan.latents(own).shape
    return {
        "schema": SCHEMA,
        "kind": "samples",
        "dtype": "float32",
        "shape": [doubled // 2, height, width],
        "encoder": plan.transformer_digest,
        **policy.decisive,
        "txt": plan.txt.id,
        "pooled": plan.pooled.id,
        "scheduler": checkpoints.working_config(plan.checkpoint, "scheduler"),
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale if is_guided(networks) else None,
    }


def is_guided(networks: Sequence[dict]) -> bool:
    """Whether any of the models that predict, by their configs, is told a guidance scale; FLUX.1-schnell is not."""
    return any(config.get("guidance_embeds") for config in networks)


def _recipe_of_trained(plan: Plan, folder: Path) -> dict:
    policy, settings = plan.precision.trained, plan.experiment
    if plan.trains != CONTROLNET:
        path = folder / lora.WEIGHTS_NAME
        found = {"weights": plan.store.facts.file_digest(path), "scale": lora.scale_of(path)}
        return {"lora": found | policy.decisive}
    found = checkpoints.component_digest(folder / controlnet.FOLDER, checkpoints.CONTROLNET, plan.store.facts)
    vae = checkpoints.config(plan.checkpoint, "vae")
    scale = {"conditioning_scale": settings.controlnet.conditioning_scale}
    return {
        "controlnet": found | scale | policy.decisive,
        "controls": plan.latents(variant(plan), settings.controlnet.condition).id,
        "vae": {key: vae[key] for key in ("scaling_factor", "shift_factor")},
    }


# --- files --------------------------------------------------------------------------------------------------------


def listing(plan: Plan, photos: Sequence[indexing.IndexedPhoto]) -> dict:
    """What samples.json says.  File names are relative to the run's folder, and as good as addresses."""
    several, settings = all_series(plan, photos), plan.experiment.sample
    files = {each.name: file_names(plan, each) for each in several}
    rows = []
    for picture in several[-1].pictures.values():
        row = {"prompt": picture.prompt, "seed": picture.seed}
        if picture.condition:
            row[CONDITION] = condition_name(plan, picture)
        rows.append(row | {name: files[name][picture.number] for name in files})
    return {
        "run_id": plan.run_id(photos),
        "trained": plan.trains,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": several[-1].entries.recipe["guidance_scale"],
        "resolution": plan.experiment.sample_resolution,
        "precision": asdict(plan.precision),
        "latents": {each.name: each.entries.id for each in several},
        "grid": GRID_NAME,
        "pictures": rows,
    }


def file_names(plan: Plan, series: Series) -> list[str]:
    """The file of each picture, in their order; whatever decides its pixels is in its name."""
    policy, vae = plan.precision.vae, checkpoints.config(plan.checkpoint, "vae")
    decoder = {key: vae[key] for key in ("scaling_factor", "shift_factor")}
    decoder |= {"vae": plan.vae_digest} | policy.decisive
    keys = (canonical(decoder | {"recipe": series.entries.id, "item": item}) for item in series.pictures)
    return [f"{FOLDER}/{number:03}-{series.name}-{digest(key)[:12]}.png" for number, key in enumerate(keys)]


def condition_name(plan: Plan, picture: Picture) -> str:
    entries = plan.latents(variant(plan), plan.experiment.controlnet.condition)
    key = canonical([entries.id, conditions.item(picture.condition, variant(plan))])
    return f"{FOLDER}/{picture.number:03}-{CONDITION}-{digest(key)[:12]}.png"


def names_in(listing: dict) -> list[str]:
    """All files that samples.json names."""
    rows = [row[name] for row in listing["pictures"] for name in (CONDITION, BASE, TRAINED) if name in row]
    return [listing["grid"], *rows]
