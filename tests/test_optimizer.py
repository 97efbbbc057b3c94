"""The optimizer against its formulas in float64 NumPy, and what a checkpoint must hold of it."""

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pipeline.settings.fields import Train

pytestmark = pytest.mark.usefixtures("cpu")

SHAPES = [(4, 8), (8, 4), (5,)]
GROUPS = [0, 0, 1]
RATES = [1e-3, 2e-4]
RNG = np.random.default_rng(0)
START = [RNG.standard_normal(shape).astype(np.float32) for shape in SHAPES]
GRADIENTS = [[RNG.standard_normal(shape).astype(np.float32) for shape in SHAPES] for _ in range(30)]
SETTINGS = Train(weight_decay=1e-2, max_grad_norm=1.0, ema_decay=0.99)
WAYS = ["host", "compiled"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """What steps the parameters: NumPy, as on CPU, or compiled functions, as elsewhere."""
    step_by(request.param, monkeypatch)


def step_by(way, monkeypatch):
    from pipeline.devices import device

    monkeypatch.setattr(device, "steps_on_host", lambda: way == "host")


def make(settings, groups=GROUPS, shards=None):
    import mindspore as ms

    from pipeline.training.optimizer import Optimizer

    trained = [ms.Parameter(ms.Tensor(values), name=f"p{number}") for number, values in enumerate(START)]
    return Optimizer(trained, settings, groups, shards)


def tensors(arrays):
    import mindspore as ms

    return [ms.Tensor(array) for array in arrays]


def reference(s, gradients, groups=GROUPS):
    """The parameters and their averages after all steps, by the papers' formulas, float64."""
    values = [start.astype(np.float64) for start in START]
    averages, first, second = [v.copy() for v in values], [0 * v for v in values], [0 * v for v in values]
    for number, batch in enumerate(gradients, 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in batch))
        factor = min(1, s.max_grad_norm / (norm + 1e-6)) if s.max_grad_norm else 1
        for i, gradient in enumerate(batch):
            rate, gradient = RATES[groups[i]], gradient.astype(np.float64) * factor
            first[i] = s.adam_beta1 * first[i] + (1 - s.adam_beta1) * gradient
            second[i] = s.adam_beta2 * second[i] + (1 - s.adam_beta2) * gradient**2
            if s.optimizer == "adamw":
                corrected = first[i] / (1 - s.adam_beta1**number)
                scale = np.sqrt(second[i] / (1 - s.adam_beta2**number)) + s.adam_epsilon
                values[i] = values[i] * (1 - rate * s.weight_decay) - rate * corrected / scale
            else:
                step = first[i] / (np.sqrt(second[i]) + s.adam_epsilon) + s.weight_decay * values[i]
                values[i] = values[i] - rate * step
            decay = min(s.ema_decay, (1 + number) / (10 + number))
            averages[i] = decay * averages[i] + (1 - decay) * values[i]
    return values, averages


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, max_grad_norm=0.0),
        replace(SETTINGS, weight_decay=0.0),
        replace(SETTINGS, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-3),
        replace(SETTINGS, optimizer="adam_weight_decay"),
        replace(SETTINGS, optimizer="adam_weight_decay", max_grad_norm=0.0),
    ],
    ids=["adamw", "unclipped", "undecayed", "betas", "adam_weight_decay", "adam_weight_decay-unclipped"],
)
def test_thirty_steps_are_those_of_the_formulas(settings, way):
    optimizer = make(settings)
    for gradients in GRADIENTS:
        norm = optimizer.update(tensors(gradients), RATES)
    values, averages = reference(settings, GRADIENTS)
    for parameter, expected in zip([*optimizer.trained, *optimizer.averages], [*values, *averages]):
        np.testing.assert_allclose(parameter.asnumpy(), expected, atol=5e-6)
    assert float(norm) == pytest.approx(np.sqrt(sum((g**2).sum() for g in GRADIENTS[-1])), rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "adam_weight_decay"])
def test_only_the_first_update_compiles(kind, monkeypatch):
    step_by("compiled", monkeypatch)
    optimizer, taken = make(replace(SETTINGS, optimizer=kind)), []
    for gradients in GRADIENTS[:3]:
        began = time.process_time()
        optimizer.update(tensors(gradients), RATES)
        taken.append(time.process_time() - began)
    assert max(taken[1:]) < taken[0] / 3


def test_what_gradients_were_multiplied_by_is_divided_out_before_clipping(way):
    plain, scaled = make(SETTINGS), make(SETTINGS)
    for gradients in GRADIENTS[:3]:
        norm = plain.update(tensors(gradients), RATES)
        same = scaled.update(tensors([g * 1024 for g in gradients]), RATES, divide_by=1024)
    assert float(norm) == float(same)
    for one, other in zip(plain.trained, scaled.trained):
        assert (one.asnumpy() == other.asnumpy()).all()


def test_each_group_has_its_learning_rate(way):
    optimizer = make(replace(SETTINGS, weight_decay=0.0))
    optimizer.update(tensors(GRADIENTS[0]), [1e-3, 0.0])
    changed = [(p.asnumpy() != start).any() for p, start in zip(optimizer.trained, START)]
    assert changed == [True, True, False]


def test_state_and_number_of_updates_are_all_that_a_later_step_depends_on(way):
    from mindspore import Tensor, ops

    unbroken, resumed = make(SETTINGS), make(SETTINGS)
    for gradients in GRADIENTS[:10]:
        unbroken.update(tensors(gradients), RATES)
    resumed.num_updates = unbroken.num_updates
    for one, other in zip(unbroken.trained, resumed.trained):
        ops.assign(other, Tensor(one.asnumpy()))
    for name, parameter in resumed.state().items():
        ops.assign(parameter, Tensor(unbroken.state()[name].asnumpy()))
    for gradients in GRADIENTS[10:15]:
        for optimizer in (unbroken, resumed):
            optimizer.update(tensors(gradients), RATES)
    for one, other in zip([*unbroken.trained, *unbroken.averages], [*resumed.trained, *resumed.averages]):
        assert (one.asnumpy() == other.asnumpy()).all()


def test_accumulated_gradients_are_summed_anew_each_time(way):
    from pipeline.training.gradients import make_accumulator

    accumulator = make_accumulator()
    for first, second in (GRADIENTS[:2], GRADIENTS[2:4]):
        accumulator.add(tensors(first), is_first=True)
        accumulator.add(tensors(second), is_first=False)
    for found, a, b in zip(accumulator.total(), GRADIENTS[2], GRADIENTS[3]):
        assert (found.asnumpy() == a + b).all()


def test_however_many_tensors_a_compiled_function_takes_the_bits_are_the_same(monkeypatch):
    """FLUX.1 has 380 tensors and more, of which MindSpore compiles some dozens at a time."""
    from pipeline.training import gradients

    step_by("compiled", monkeypatch)
    found = []
    for size in (len(SHAPES), 1, 2):
        monkeypatch.setattr(gradients, "SLICE", size)
        optimizer, accumulator = make(SETTINGS), gradients.make_accumulator()
        for batches in zip(GRADIENTS[:6:2], GRADIENTS[1:6:2]):
            for number, batch in enumerate(batches):
                accumulator.add(tensors(batch), is_first=number == 0)
            norm = optimizer.update(accumulator.total(), RATES, divide_by=2)
        parameters = [*optimizer.trained, *optimizer.state().values()]
        found.append([norm.asnumpy().tobytes(), *(parameter.asnumpy().tobytes() for parameter in parameters)])
    assert found[0] == found[1] == found[2]


def test_whichever_places_a_rank_keeps_the_bits_are_those_of_one_rank(monkeypatch):
    """Ranks that share the state keep other places each; all of them take the norm of all gradients."""
    from pipeline.training import host_step

    step_by("host", monkeypatch)
    found = []
    for chunk, own in ((1 << 15, None), (7, None), (1 << 15, [0, 2]), (1 << 15, [1])):
        monkeypatch.setattr(host_step, "CHUNK", chunk)
        optimizer = make(SETTINGS, shards=own and Keeping(own))
        for batch in GRADIENTS[:4]:
            optimizer.update(tensors(batch), RATES)
        state = {place: parameter.asnumpy().tobytes() for place, parameter in enumerate(optimizer.trained)}
        found.append({place: state[place] for place in own or state})
    whole, short, *shared = found
    assert whole == shared[0] | shared[1]
    assert all(np.allclose(np.frombuffer(whole[p], "f4"), np.frombuffer(short[p], "f4"), atol=1e-6) for p in whole)


@dataclass(frozen=True)
class Keeping:
    """Of several ranks, one that gets nothing from the others."""

    own: list[int]

    def give(self, trained):
        pass


@pytest.mark.slow
def test_what_compiling_the_step_takes_grows_no_faster_than_the_number_of_tensors(monkeypatch):
    """380: a LoRA on FLUX.1's attention.  836: on all its linear layers."""
    step_by("compiled", monkeypatch)
    import mindspore as ms

    from pipeline.training.optimizer import Optimizer

    seconds = {}
    for count in (64, 380, 836):  # the first one, of which nothing is asked, pays for what is done once a process
        trained = [ms.Parameter(ms.Tensor(START[number % 2]), name=f"{count}.{number}") for number in range(count)]
        optimizer, gradients = Optimizer(trained, SETTINGS), tensors(GRADIENTS[0][:2] * (count // 2))
        began = time.process_time()
        optimizer.update(gradients, RATES)
        seconds[count] = time.process_time() - began
    assert seconds[836] < 2.5 * seconds[380]


def test_the_norm_tells_an_overflow(way):
    optimizer = make(SETTINGS)
    assert np.isfinite(optimizer.norm(tensors(GRADIENTS[0]), 1.0))
    for bad in (np.inf, np.nan):
        gradients = [g.copy() for g in GRADIENTS[0]]
        gradients[1][2, 2] = bad
        assert not np.isfinite(optimizer.norm(tensors(gradients), 1.0))


def test_the_loss_scale_halves_on_overflow_and_doubles_after_its_interval():
    from pipeline.training.gradients import LossScale

    scale = LossScale(1024.0, interval=3)
    seen = []
    for is_finite in (True, True, True, True, False, True, True, True):
        scale.adjust(is_finite)
        seen.append((scale.scale, scale.good_steps))
    assert seen == [(1024, 1), (1024, 2), (2048, 0), (2048, 1), (1024, 0), (1024, 1), (1024, 2), (2048, 0)]
