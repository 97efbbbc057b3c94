"""What runs after what.  ``luigi --module tasks TrainLoRA [--experiment FILE]``

Each task starts its stage as a process of its own, and is complete when the stage's output is there.
"""

import logging
import os
import sys

import luigi

from pipeline.data.survey_file import SurveyFile
from pipeline.errors import UserError
from pipeline.plan import pictures
from pipeline.plan.plan import CONTROLNET, LORA, device_and_precision
from pipeline.plan.survey import Survey
from pipeline.settings.reading import load_experiment
from pipeline.stages import STAGES, is_done, survey_for
from tasks import manners, scheduler
from tasks.process import StageFailed, run_stage

manners.apply()


class ExperimentParameter(luigi.Parameter):
    """The path of an experiment file; what is wrong with it is said before anything is scheduled."""

    def parse(self, text: str) -> str:
        try:
            device_and_precision(load_experiment(text))
        except UserError as error:
            sys.exit(f"error: {error}")
        return self.normalize(text)

    def normalize(self, text: str) -> str:
        return os.path.abspath(os.path.expanduser(text)) if text else ""


class SampledExperimentParameter(ExperimentParameter):
    """As ExperimentParameter, of a file that asks for pictures of what it trains."""

    def __init__(self, trains: str, **options):
        super().__init__(default="", description="TOML file with prompts in [sample]", **options)
        self.trains = trains

    def parse(self, text: str) -> str:
        path = super().parse(text)
        try:
            pictures.check(load_experiment(path), self.trains)
        except UserError as error:
            sys.exit(f"error: {error}")
        return path


class OfExperiment:
    """What every task here is told."""

    experiment = ExperimentParameter(default="", description="TOML file; without it, the embedded default")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        scheduler.choose(self.task_family)  # Luigi makes the command's task, then looks where its scheduler is


class StageTask(OfExperiment, luigi.Task):
    """A task whose work is the stage of the same name."""

    resources = {"device": 1}

    def complete(self):
        return is_done(self.task_family, survey(self.experiment))

    def is_finished(self) -> bool:
        """Whether its stage has nothing to do, asked when its turn comes.

        Luigi asks what is complete before the first task runs; without a memory of file digests nothing is, until
        CheckData has run.
        """
        return self.complete()

    def run(self):
        if self.is_finished():
            logging.getLogger("luigi-interface").info("its output is there already: %s", self)
            return
        run_stage(self.task_family, self.experiment, survey_for(self.task_family, survey(self.experiment)))
        if STAGES[self.task_family].trains is None:  # it may have learnt of photos, or fetched the model
            look_again(self.experiment)
        if not self.complete():
            raise StageFailed(f"{self.task_family} ended without an error, but its output is missing or incomplete")


_surveys: dict[str, Survey] = {}


def survey(path: str) -> Survey:
    """The survey of an experiment file as it now is, made once and kept, and handed on to the stages' processes."""
    experiment, known = load_experiment(path), _surveys.get(path)
    if known is None or known.experiment != experiment:
        files = {with_conditions: SurveyFile() for with_conditions in (False, True)}
        known = _surveys[path] = Survey(experiment, files)
    return known


def look_again(*paths: str) -> None:
    """Have surveys find what was not known before."""
    for path in paths or list(_surveys):
        _surveys[path] = _surveys[path].anew()


os.register_at_fork(after_in_child=look_again)  # one of several workers: another one may have learnt something


class GetModel(StageTask):
    """The checkpoint on this machine: a local folder as it is, a download from the Hub, or what this package brings."""


class CheckData(StageTask):
    """Every photo decodes and has a caption; what is wrong is reported all at once."""


class CheckControls(StageTask):
    """Every photo has a condition that decodes and is of its shape; what is wrong is reported all at once."""

    priority = 3  # before hours of encoding

    def requires(self):
        return CheckData(self.experiment)


class CheckRoom(StageTask):
    """The disks have room for all that the encoders and a LoRA's training will write."""

    priority = 3

    def is_finished(self):
        return self.complete() and is_done("TrainLoRA", survey(self.experiment))  # before, its table is to be seen

    def requires(self):
        return GetModel(self.experiment), CheckData(self.experiment)


class CheckControlNetRoom(StageTask):
    """As CheckRoom, for a ControlNet's training; also, that a ControlNet can be made as the experiment says."""

    priority = 3

    def is_finished(self):
        return self.complete() and is_done("TrainControlNet", survey(self.experiment))

    def requires(self):
        return GetModel(self.experiment), CheckControls(self.experiment)


class EncodeStage(StageTask):
    def requires(self):
        return CheckRoom(self.experiment)


class EncodeCLIP(EncodeStage):
    """CLIP's pooled output of every caption."""

    priority = 2


class EncodeT5(EncodeStage):
    """T5's output sequence of every caption."""

    priority = 1


class EncodePrompts(OfExperiment, luigi.WrapperTask):
    """Captions through both text encoders, one after the other."""

    def requires(self):
        return EncodeCLIP(self.experiment), EncodeT5(self.experiment)


class EncodeImages(EncodeStage):
    """The VAE's posterior of every image."""


class EncodeControls(EncodeStage):
    """The VAE's posterior of every photo's condition."""

    priority = 3

    def requires(self):
        return CheckControlNetRoom(self.experiment)


class TrainLoRA(StageTask):
    """A LoRA trained on the cached tensors."""

    def requires(self):
        return EncodePrompts(self.experiment), EncodeImages(self.experiment)


class TrainControlNet(StageTask):
    """A ControlNet trained on the cached tensors."""

    def requires(self):
        stages = EncodePrompts, EncodeImages, EncodeControls
        return [stage(self.experiment) for stage in stages]


class MeasureLoss(StageTask):
    """The loss on the experiment's own photos before and after training, over fixed pairs of noise and level."""

    def requires(self):
        return TrainLoRA(self.experiment)


class MeasureControlNet(StageTask):
    """As MeasureLoss, without and with the ControlNet."""

    def requires(self):
        return TrainControlNet(self.experiment)


class SampleLatents(StageTask):
    """The final latents of the prompts' pictures, by the transformer as it is and with the run's LoRA."""

    experiment = SampledExperimentParameter(LORA)

    def requires(self):
        return EncodePrompts(self.experiment), TrainLoRA(self.experiment)


class SampleControlNetLatents(StageTask):
    """As SampleLatents, with the run's ControlNet."""

    experiment = SampledExperimentParameter(CONTROLNET)

    def requires(self):
        stages = EncodePrompts, EncodeControls, TrainControlNet
        return [stage(self.experiment) for stage in stages]


class Sample(StageTask):
    """The prompts' pictures, decoded, and one image that shows them side by side."""

    experiment = SampledExperimentParameter(LORA)

    def requires(self):
        return SampleLatents(self.experiment)


class SampleControlNet(StageTask):
    """As Sample, with the conditions beside the pictures."""

    experiment = SampledExperimentParameter(CONTROLNET)

    def requires(self):
        return SampleControlNetLatents(self.experiment)
