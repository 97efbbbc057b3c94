"""Prior preservation (arXiv:2208.12242, section 3.2): the base model's own pictures, which a training is reminded of.

They are final latents in the store, as those of [sample] are: no VAE comes near them.  Imports no MindSpore.
"""

from typing import TYPE_CHECKING

from cache import Need, Source
from pipeline.data import variants
from pipeline.data.variants import Variant
from pipeline.plan import pictures
from pipeline.plan.pictures import Drawing, Picture, Series
from pipeline.settings.experiment import Experiment

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

STAGE = "DrawPrior"
"""The stage that draws them."""


def prompts(experiment: Experiment) -> tuple[str, ...]:
    """The prompts that a picture is drawn of."""
    return experiment.prior.prompts[: experiment.prior.num_images]


def series(plan: "Plan") -> list[Series]:
    """The pictures by size, one of each resolution of [data] in turn; none where the experiment asks for none."""
    settings, sizes = plan.experiment.prior, variants.squares(plan.experiment.data)
    asked = prompts(plan.experiment)
    if not asked:
        return []
    all_pictures = [
        Picture(number, asked[number % len(asked)], settings.seed + number) for number in range(settings.num_images)
    ]
    found = []
    for place, size in enumerate(sizes):
        own = [each for each in all_pictures if each.number // len(asked) % len(sizes) == place]
        if own:
            drawing = Drawing(
                Variant(*size), settings.num_inference_steps, settings.guidance_scale, settings.batch_size
            )
            found.append(pictures.of_base(plan, f"prior {size[0]}", drawing, own))
    return found


def needs(plan: "Plan") -> list[Need]:
    """What a training with a prior needs of the store besides what encoders make."""
    return [
        Need.of(
            STAGE,
            plan.family.network,
            each.entries.recipe,
            [Source(item, *[each.words(item)] * 2) for item in each.pictures],
        )
        for each in series(plan)
    ]


def identity(plan: "Plan") -> dict:
    """What of it decides the weights of a run; nothing where there is none."""
    found = [[each.entries.id, list(each.pictures)] for each in series(plan)]
    return {"prior": {"weight": plan.experiment.prior.weight, "pictures": found}} if found else {}
