"""What the embedded model paints and learns, by the same path as a user's experiments; `python -m benchmarks.fidelity`
measures more pictures, and other precisions."""

import pytest

from benchmarks import fidelity

pytestmark = pytest.mark.slow


def test_a_lora_teaches_a_new_word_and_leaves_the_old_ones(tmp_path):
    found = fidelity.taught(tmp_path, "fp32", num_old=40, num_new=40)
    base, trained = found["old", "base"], found["old", "trained"]
    assert min(base["colour"], base["background"]) >= 0.9 and base["shape"] >= 0.8
    assert found["new", "base"]["shape"] <= 0.1 and found["new", "trained"]["shape"] >= 0.7
    assert all(trained[name] >= base[name] - 0.15 for name in base)


def test_a_controlnet_teaches_to_follow_outlines(tmp_path):
    found = fidelity.guided(tmp_path, "fp32", 40)
    assert found["trained"] >= 0.75 and found["base"] <= 0.3
