"""A ControlNet (arXiv:2302.05543) as a method: a copy of the transformer's first blocks that reads a condition."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.data import conditions
from pipeline.data.variants import Variant
from pipeline.flux import counts, models, pretrained
from pipeline.flux.family import Flux
from pipeline.methods import controlnet_model
from pipeline.plan import identity, pictures
from pipeline.plan.method import Method, Saving, Trainee
from pipeline.plan.plan import Plan
from pipeline.settings.experiment import Experiment


class ControlNet(Method):
    name, label = "controlnet", "ControlNet"
    reads_conditions = True
    result_files = (controlnet_model.WEIGHTS_NAME, controlnet_model.CONFIG_NAME)

    def loading(self, folder: str) -> str:
        return f"FluxControlNetModel.from_pretrained({f'{folder}/{controlnet_model.FOLDER}'!r})"

    def has_pairs(self, experiment: Experiment) -> bool:
        return experiment.controlnet.condition == conditions.FILE

    def condition(self, experiment: Experiment) -> str:
        return experiment.controlnet.condition

    def identity(self, plan: Plan) -> dict:
        settings, origin = identity.settings_in(plan.experiment, "controlnet"), plan.experiment.init_from
        depths = "num_double_layers", "num_single_layers"
        if not origin:
            settings |= zip(depths, controlnet_model.depths(plan.experiment, plan.config(plan.family.network)))
        else:
            settings = {key: value for key, value in settings.items() if key not in depths}
            settings["init_from"] = pretrained.component_digest(origin, pretrained.CONTROLNET, plan.store.facts)
        return {
            "controlnet": settings,
            "controls": {
                "entries": [need.entries.id for need in plan.control_needs],
                "items": [conditions.item(photo, Variant(0, 0)) for photo in plan.photos],
            },
        }

    def confirm(self, plan: Plan) -> None:
        if plan.experiment.init_from:
            pretrained.confirm(plan.experiment.init_from, pretrained.CONTROLNET, plan.store.facts)

    def make(self, plan: Plan, frozen: dict) -> Trainee:
        network = controlnet_model.make(frozen[plan.family.network], plan.experiment, plan.precision.trained)
        self.confirm(plan)

        def save(folder, result, metadata):
            return controlnet_model.save(network, folder, result, self.saved_dtype(plan.experiment), metadata)

        trainee = self._trainee(plan, frozen, network)
        trainee.save = save
        return trainee

    def load(self, plan: Plan, frozen: dict, folder: Path) -> Trainee:
        own, policy = (folder / controlnet_model.FOLDER, pretrained.CONTROLNET), plan.precision.trained
        pretrained.component_digest(*own, plan.store.facts)
        network = models.load_model(*own, policy.params)
        pretrained.confirm(*own, plan.store.facts)
        controlnet_model.use_precision(network, policy)
        return self._trainee(plan, frozen, network)

    def _trainee(self, plan: Plan, frozen: dict, network) -> Trainee:
        base, scale = frozen[plan.family.network], plan.experiment.controlnet.conditioning_scale
        layer = self.name, [*network.controlnet_blocks, *network.controlnet_single_blocks][0]
        predict = plan.family.prediction(transformer=base, controlnet=network, conditioning_scale=scale)
        networks = {plan.family.network: base, controlnet_model.FOLDER: network}
        trainee = Trainee(frozen, networks, predict, list(network.get_parameters()), layer)
        trainee.as_saved = functools.partial(controlnet_model.as_saved, trainee.trained)
        return trainee

    def drawn_with(self, plan: Plan, folder: Path) -> dict:
        settings, own = plan.experiment.controlnet, folder / controlnet_model.FOLDER
        found = pretrained.component_digest(own, pretrained.CONTROLNET, plan.store.facts)
        scale = {"conditioning_scale": settings.conditioning_scale}
        return {
            "controlnet": found | scale | plan.precision.trained.decisive,
            "controls": plan.latents(pictures.variant(plan), settings.condition).id,
            "vae": plan.family.scaling(plan.config(plan.family.image_encoder)),
        }

    def configs(self, plan: Plan, folder: Path) -> list[dict]:
        return [pretrained.config(folder / controlnet_model.FOLDER, pretrained.CONTROLNET)]

    def num_trained(self, experiment: Experiment, family: Flux, config_of: Callable[[str], dict]) -> int:
        config = config_of(family.network)
        controlnet_model.check(experiment, config)
        return counts.controlnet(config, *controlnet_model.depths(experiment, config))

    def num_blocks(self, experiment: Experiment, config: dict) -> int:
        return sum(controlnet_model.depths(experiment, config))

    def saved_dtype(self, experiment: Experiment) -> str:
        return experiment.controlnet.save_dtype

    def savings(self, experiment: Experiment, config: dict) -> Iterator[Saving]:
        if not experiment.init_from:
            double, _ = controlnet_model.depths(experiment, config)
            for number in range(double - 1, 0, -1):
                yield Saving("controlnet", "num_double_layers", number)
