import pytest

from pipeline.settings.fields import Lora, Sampling, Settings, Train
from pipeline.settings.questions import questions


def test_nothing_is_asked_about_the_defaults():
    assert questions(Settings(), "lora") == questions(Settings(), "controlnet") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(train=Train(learning_rate=500.0)), "train.learning_rate = 500: is that meant? Usual is 1e-5 to 1e-3"),
        (Settings(train=Train(ema_decay=0.1)), "train.ema_decay = 0.1: is that meant?"),
        (Settings(train=Train(steps=10, lr_warmup_steps=10, lr_scheduler="linear")), "its learning rate is never"),
        (Settings(sample=Sampling(prompts=("a cat",), num_inference_steps=1000)), "num_inference_steps = 1000"),
        (Settings(lora=Lora(rank=1000, alpha=1000.0)), "lora.rank = 1000: is that meant?"),
        (Settings(lora=Lora(rank=16)), "lora.alpha = 4: with rank = 16 the LoRA is scaled by 0.25"),
    ],
)
def test_what_is_seldom_meant_is_asked_about(settings, said):
    (question,) = questions(settings, "lora")
    assert said in question


def test_a_controlnets_training_is_not_asked_about_the_lora():
    assert questions(Settings(lora=Lora(rank=16)), "controlnet") == []
