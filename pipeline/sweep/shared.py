"""What experiments of a sweep share: all before the training, where they differ in nothing that is read there."""

import dataclasses

from pipeline.settings.experiment import Experiment
from pipeline.settings.fields import ControlNet, Lora, Train


def key(experiment: Experiment) -> str:
    """Equal for experiments whose checks, encodings and pictures of [prior] are the same.

    Of what is trained, and how, only this is read before: whether captions are dropped, as the empty one is encoded
    then; and which conditions are computed.
    """
    train = Train(caption_dropout=0.5 if experiment.train.caption_dropout else 0.0)
    controlnet = ControlNet(condition=experiment.controlnet.condition)
    same = dataclasses.replace(experiment, name="", seed=0, lora=Lora(), controlnet=controlnet, train=train, tables=())
    return repr(same)
