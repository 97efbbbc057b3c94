"""LoRA (arXiv:2106.09685) as a method: low-rank layers in the transformer, and in CLIP where it trains too."""

from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError
from pipeline.flux import counts
from pipeline.flux.family import Flux
from pipeline.methods import lora_layers, lora_start
from pipeline.plan import identity
from pipeline.plan.method import Method, StageNames, Trainee
from pipeline.plan.plan import Plan
from pipeline.settings.experiment import Experiment


class LoRA(Method):
    name, label = "lora", "LoRA"
    stages = StageNames("CheckRoom", "TrainLoRA", "MeasureLoss", "SampleLatents", "Sample", "Report")
    result_files = (lora_layers.WEIGHTS_NAME,)

    def loading(self, folder: str) -> str:
        return f"pipe.load_lora_weights({folder!r})"

    def identity(self, plan: Plan) -> dict:
        settings = identity.settings_in(plan.experiment, "lora")
        if origin := plan.experiment.lora_init_from:
            if not origin.is_file():
                raise UserError(f"{origin}: no such file; check [lora] init_from")
            settings["init_from"] = plan.store.facts.file_digest(origin)
        return {"lora": settings}

    def confirm(self, plan: Plan) -> None:
        if plan.experiment.lora_init_from:
            plan.store.facts.confirm([plan.experiment.lora_init_from])

    def frozen(self, experiment: Experiment, family: Flux) -> tuple[str, ...]:
        trained = (family.trainable_encoder.component,) if self.trains_encoder(experiment) else ()
        return (family.network, *trained)

    def trains_encoder(self, experiment: Experiment) -> bool:
        return experiment.lora.train_text_encoder

    def make(self, plan: Plan, frozen: dict) -> Trainee:
        adapted = self._adapted(plan, frozen)
        lineage = {}
        if origin := plan.experiment.lora_init_from:
            lineage["init_from"] = self.identity(plan)["lora"]["init_from"]  # of the file before it is opened
            adapted.begin_from(lora_start.read(origin, plan.experiment.lora, plan.config))
            self.confirm(plan)
        dropouts = adapted.add_dropout()
        trainee = self._trainee(plan, frozen, adapted)

        def save(folder, result, metadata):
            return adapted.save(folder, result, metadata | lineage)

        trainee.save, trainee.before_batch = save, dropouts.reseed
        return trainee

    def load(self, plan: Plan, frozen: dict, folder: Path) -> Trainee:
        adapted, path = self._adapted(plan, frozen), folder / lora_layers.WEIGHTS_NAME
        plan.store.facts.file_digest(path)
        adapted.load(path)
        plan.store.facts.confirm([path])
        return self._trainee(plan, frozen, adapted)

    def _adapted(self, plan: Plan, frozen: dict) -> lora_layers.Adapted:
        return lora_layers.Adapted(frozen, plan.experiment.lora, plan.precision.trained, plan.experiment.seed)

    def _trainee(self, plan: Plan, frozen: dict, adapted: lora_layers.Adapted) -> Trainee:
        network, layer = plan.family.network, (self.name, adapted.first_layer())
        predict = plan.family.prediction(**frozen)
        trainee = Trainee(frozen, {network: frozen[network]}, predict, adapted.trained, layer, adapted.groups)
        trainee.as_saved = adapted.as_saved
        return trainee

    def drawn_with(self, plan: Plan, folder: Path) -> dict:
        path = folder / lora_layers.WEIGHTS_NAME
        found = {"weights": plan.store.facts.file_digest(path), "scale": lora_layers.scale_of(path)}
        return {"lora": found | plan.precision.trained.decisive}

    def num_trained(self, experiment: Experiment, family: Flux, config_of: Callable[[str], dict]) -> int:
        settings, layers = experiment.lora, family.network_layers(config_of(family.network))
        if experiment.lora_init_from:
            lora_start.read(experiment.lora_init_from, settings, config_of)
        targets = lora_layers.wanted_targets(settings)
        for target in targets:
            if not any(counts.is_meant(name, target) for name in layers):
                raise UserError(f"lora.targets: no linear layer of the {family.network} is named {target}")
        trained = counts.lora(layers, settings.rank, targets)
        if self.trains_encoder(experiment):
            layers = family.encoder_layers(config_of(family.trainable_encoder.component))
            trained += counts.lora(layers, settings.rank, lora_layers.TEXT_ENCODER_TARGETS)
        return trained
