"""The learning rate of single steps, computed by hand, and of all steps, compared with mindone's own function."""

import importlib.util
import math
from pathlib import Path

import pytest

from pipeline.training.schedules import NAMES, Schedule, depends_on_total

BASE = 3e-4


def rates(name: str, warmup: int, total: int, **settings) -> list[float]:
    schedule = Schedule(name, BASE, warmup, total, **settings)
    return [schedule.at(step) for step in range(total)]


@pytest.fixture(scope="module")
def get_scheduler():
    """mindone's port of diffusers' function, which returns the rates of all steps; loaded without MindSpore."""
    (folder,) = importlib.util.find_spec("mindone").submodule_search_locations
    spec = importlib.util.spec_from_file_location("optimization", Path(folder) / "diffusers" / "optimization.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_scheduler


@pytest.mark.parametrize("warmup, total", [(0, 1), (0, 40), (1, 40), (13, 40), (39, 40), (40, 40), (70, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_every_step_has_the_rate_of_mindones_function(get_scheduler, name, warmup, total):
    expected = get_scheduler(name, BASE, num_warmup_steps=warmup, num_training_steps=total)
    assert rates(name, warmup, total) == pytest.approx(expected, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize(
    "name, settings", [("cosine_with_restarts", {"num_cycles": 3}), ("polynomial", {"power": 2.5})]
)
def test_cycles_and_power_mean_what_they_mean_to_mindone(get_scheduler, name, settings):
    expected = get_scheduler(name, BASE, num_warmup_steps=7, num_training_steps=90, **settings)
    assert rates(name, 7, 90, **settings) == pytest.approx(expected, rel=1e-9, abs=1e-18)


BY_HAND = [  # 10 steps of warm-up, 110 in all: step 35 is a quarter, 60 a half of the way down
    ("constant", {}, {0: 1, 5: 1, 35: 1, 109: 1, 110: 1, 9999: 1}),
    ("constant_with_warmup", {}, {0: 0, 5: 0.5, 9: 0.9, 10: 1, 109: 1, 9999: 1}),
    ("linear", {}, {0: 0, 5: 0.5, 10: 1, 35: 0.75, 60: 0.5, 109: 0.01, 110: 0, 111: 0, 9999: 0}),
    ("cosine", {}, {5: 0.5, 10: 1, 35: (2 + 2**0.5) / 4, 60: 0.5, 85: (2 - 2**0.5) / 4, 110: 0, 210: 1}),
    ("cosine", {"num_cycles": 1.5}, {5: 0.5, 10: 1, 35: (2 - 2**0.5) / 4, 60: 0.5, 110: 0}),
    ("cosine_with_restarts", {}, {5: 0.5, 10: 1, 35: (2 + 2**0.5) / 4, 60: 0.5, 110: 0, 111: 0, 9999: 0}),
    ("cosine_with_restarts", {"num_cycles": 2}, {10: 1, 35: 0.5, 60: 1, 85: 0.5, 110: 0, 135: 0}),
    ("polynomial", {}, {5: 0.5, 10: 1, 35: 0.75 + 0.25e-7 / BASE, 110: 1e-7 / BASE, 111: 1e-7 / BASE}),
    ("polynomial", {"power": 2}, {5: 0.5, 10: 1, 60: 0.25 + 0.75e-7 / BASE, 110: 1e-7 / BASE, 9999: 1e-7 / BASE}),
]


@pytest.mark.parametrize("name, settings, factors", BY_HAND)
def test_single_steps_have_the_rates_computed_by_hand(name, settings, factors):
    schedule = Schedule(name, BASE, 10, 110, **settings)
    found = {step: schedule.at(step) for step in factors}
    assert found == pytest.approx({step: BASE * factor for step, factor in factors.items()}, rel=1e-12, abs=1e-18)


def test_the_cases_by_hand_cover_every_schedule():
    assert {name for name, _, _ in BY_HAND} == set(NAMES)


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_rate_grows_evenly_to_its_base_and_goes_on_from_there_without_a_jump(name):
    found = rates(name, 100, 1100)
    assert found[100] == max(found) == BASE
    assert [after - before for before, after in zip(found[:100], found[1:101])] == pytest.approx([BASE / 100] * 100)
    assert BASE * (1 - math.pi / 1000) < found[101] <= BASE


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_depends_on_the_length_of_the_run_where_it_says_so(name):
    shorter, longer = (Schedule(name, BASE, 5, total) for total in (50, 60))
    assert depends_on_total(name) == any(shorter.at(step) != longer.at(step) for step in range(50))


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_is_never_negative_nor_above_its_base(name):
    for cycles in (0, 0.3, 1, 2.5):
        schedule = Schedule(name, BASE, 3, 50, num_cycles=cycles)
        assert all(0 <= schedule.at(step) <= BASE for step in range(200))


def test_a_name_that_diffusers_does_not_have_is_refused():
    for refused in (lambda: Schedule("cosin", BASE, 0, 10), lambda: depends_on_total("cosin")):
        with pytest.raises(ValueError, match="'cosin': must be one of constant, .*polynomial"):
            refused()


def test_a_polynomial_that_would_have_to_rise_is_refused():
    with pytest.raises(ValueError, match="must be above it, found 1e-07"):
        Schedule("polynomial", 1e-7, 0, 10)
