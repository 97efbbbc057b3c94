"""Compiled graphs that are kept for the next process: the same bits, and never those of something else."""

import json
import os

import mindspore as ms
import pytest
from lab import Lab
from mindspore.common import api
from PIL import Image

from pipeline.devices import device, kept_graphs
from pipeline.flux import tiny
from pipeline.methods import kept
from pipeline.plan import mode, pictures
from pipeline.plan.method import Trainee
from pipeline.training import checkpoint

pytestmark = pytest.mark.usefixtures("cpu")

COMPILED = {"mode": "jit", "steps": 3}
DRAWN = {"prompts": ["a red circle"], "num_inference_steps": 2, "mode": "jit"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return kept_graphs.root()


def made(lab: Lab) -> str:
    """Train and draw in processes of their own, as the scheduler does.  Returns what they said."""
    return lab.said("TrainLoRA") + lab.said("SampleLatents")


def bits(lab: Lab) -> tuple[bytes, list[bytes]]:
    """Of the weights and of the pictures' final latents."""
    drawn = [series.entries.read_many(list(series.pictures)) for series in pictures.all_series(lab.plan)]
    return (lab.run_folder / "pytorch_lora_weights.safetensors").read_bytes(), [array.tobytes() for array in drawn]


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_what_was_compiled_before_is_not_compiled_again_and_computes_the_same_bits(cache, tmp_path, dropout):
    """Of another learning rate; and with dropout, whose counter is no weight of a model."""
    first = Lab(tmp_path / "first", tiny.write_tiny_model(tmp_path / "model", blocks=(1, 1)))
    first.set("train", **COMPILED).set("sample", **DRAWN).set("lora", dropout=dropout).encode()
    other, alone = (
        first.copy(tmp_path / name).set("train", learning_rate=3e-3, weight_decay=0.1) for name in ("other", "alone")
    )
    assert "compiled before" not in made(first)
    assert len(os.listdir(cache)) == 3  # the step's graphs, and those that draw the base's picture and the LoRA's
    assert made(other).count("compiled before") == 3
    alone.set("device", keep_compiled="never").set("sample", mode="pynative").run("TrainLoRA", "SampleLatents")
    assert bits(other) == bits(alone) != bits(first)


def entries_of(lab: Lab) -> list[bytes]:
    several = lab.plan.pooled, lab.plan.txt, lab.latents
    items = [sorted(item for segment in each.index().segments for item in segment.items()) for each in several]
    return [each.read_many(own).tobytes() for each, own in zip(several, items)]


@pytest.mark.parametrize("how", ["as it is", "with other bits", "failing"])
def test_many_items_are_encoded_by_a_compiled_model_if_the_bits_are_the_same(
    cache, encoded, tmp_path, monkeypatch, capfd, how
):
    def compiled(function, parameters):
        if how == "failing":
            raise RuntimeError("cannot\nbe compiled")
        return (lambda tensor: function(tensor) + 1) if how == "with other bits" else do_compile(function, parameters)

    do_compile = kept.device.compiled
    monkeypatch.setattr(kept.device, "compiled", compiled)
    monkeypatch.setattr(mode, "ITEMS_THAT_REPAY_COMPILING", 3)
    lab = Lab(tmp_path / "lab", encoded.model).run("CheckData", "EncodeCLIP", "EncodeT5", "EncodeImages")
    assert entries_of(lab) == entries_of(encoded)
    said = "".join(capfd.readouterr())
    if how == "as it is":
        assert len(os.listdir(cache)) == 2 and "not compiled" not in said
    else:
        reason = {"failing": "that fails: cannot be compiled", "with other bits": "its bits would be others"}[how]
        assert said.count(f"not compiled, as {reason}") == 2


def test_a_damaged_graph_is_compiled_again(cache, tmp_path):
    folder, own = cache / "one", tmp_path / "own"
    graph = own / "rank_0" / "compile_cache_3.mindir"
    graph.parent.mkdir(parents=True)
    cache.mkdir(parents=True)
    graph.write_bytes(b"graph")
    kept_graphs._keep(own, 3, folder, {})
    taken = tmp_path / "taken"
    assert list(kept_graphs._take(folder, taken, 5)) == ["rank_0/compile_cache_0.mindir"]
    assert (taken / "rank_0" / "compile_cache_5.mindir").read_bytes() == b"graph"
    (folder / "rank_0" / "compile_cache_0.mindir").write_bytes(b"grape")
    assert kept_graphs._take(folder, tmp_path / "again", 0) == {}
    assert not (tmp_path / "again").exists()


def test_what_was_not_used_for_longest_goes(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_graphs, "MOST", 2)
    cache.mkdir(parents=True)
    (tmp_path / "compile_cache_0.mindir").write_bytes(b"graph")
    for number, name in enumerate("abc"):
        kept_graphs._keep(tmp_path, 0, cache / name, {})
        if (cache / "a").exists():
            os.utime(cache / name, (number, number))
        if name == "b":
            assert kept_graphs._take(cache / "a", tmp_path / "taken", 0)  # used, and by that the newest
    assert sorted(os.listdir(cache)) == ["a", "c"]


def test_a_process_that_has_compiled_others_and_runs_no_script_reads_what_is_kept(cache, monkeypatch):
    """As python -c, or a notebook with several trainings.  A graph was read where another function's is computed."""
    monkeypatch.setattr(api, "entry_script_path", "/nowhere/-c")
    weight = ms.Parameter(ms.Tensor([2.0, 3.0]), name="weight")

    def twice(x):
        return 2 * (x * weight)

    def thrice(x):
        return 3 * (x * weight)

    def computed(function, name: str) -> list:
        with kept_graphs.keeping({"name": name}):
            return device.compiled(function, [weight])(ms.Tensor([1.0, 1.0])).asnumpy().tolist()

    assert [computed(twice, "a"), computed(thrice, "b")] == [[4, 6], [6, 9]]
    assert [computed(thrice, "a"), computed(twice, "b"), computed(twice, "c")] == [[4, 6], [6, 9], [4, 6]]
    assert api.entry_script_path == "/nowhere/-c" and kept_graphs.ENABLE not in os.environ


def test_a_folder_that_others_can_write_to_is_not_used(cache, capsys):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with kept_graphs.keeping({}) as folder:
        assert folder is None and kept_graphs.ENABLE not in os.environ
    assert "others can write to" in capsys.readouterr().out
    assert os.listdir(cache) == []


def test_a_home_without_room_is_said_and_nothing_else_happens(cache, tmp_path, capsys):
    (tmp_path / "cache").write_text("in the way")
    with kept_graphs.keeping({}) as folder:
        assert folder is None
    assert "compiled steps are not kept for later" in capsys.readouterr().out


def test_two_parameters_of_one_name_are_refused():
    same = [ms.Parameter(ms.Tensor([1.0]), name="weight") for _ in range(2)]
    with pytest.raises(ValueError, match="one name"):
        kept_graphs.cell_of(lambda x: x, same)


FREE = {"train": {"learning_rate": 0.5, "steps": 9, "lr_scheduler": "cosine", "lr_warmup_steps": 2}}
OF_OPTIMIZER = {"adam_beta1": 0.5, "max_grad_norm": 2.0, "weight_decay": 0.3, "optimizer": "adam_weight_decay"}
BOUND = {
    "train": {"batch_size": 1, "accumulate": 2},
    "lora": {"rank": 2, "alpha": 9.0, "dropout": 0.5},
    "precision": {"preset": "fp16"},
    "device": {"exec_order": "dfs"},
}


def test_a_graph_is_of_all_that_decides_it_and_of_nothing_else(encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_graphs, "keeping", lambda decided: decided)
    lab = encoded.copy(tmp_path / "lab")
    settings, frozen = json.loads(json.dumps(lab.settings)), lab.plan.load_frozen()
    untrained_here = Trainee(frozen, frozen, frozen["transformer"], [])

    def decided(table: str = "", **changed) -> str:
        lab.settings = json.loads(json.dumps(settings))
        plan = lab.set(table or "train", **changed).plan
        first = [ms.Tensor([0.0] * plan.experiment.train.batch_size)]
        monkeypatch.setattr(kept.device, "jit_options", lambda: {"exec_order": plan.experiment.device.exec_order})
        return str(kept.first_step(plan, untrained_here, checkpoint.identity_of(plan.decisive), [tuple(first), more]))

    more: tuple = ()
    own = decided()
    for table, values in FREE.items():
        assert decided(table, **values) == own
    for table, values in BOUND.items():
        for name, value in values.items():
            assert decided(table, **{name: value}) != own, name
    assert all(decided(**{name: value}) == own for name, value in OF_OPTIMIZER.items())
    monkeypatch.setattr(kept.device, "steps_on_host", lambda: False)
    own = decided()
    assert all(decided(**{name: value}) != own for name, value in OF_OPTIMIZER.items())
    more = (ms.Tensor([0.0, 0.0, 0.0]),)  # another batch of the same step, of another size
    assert decided() != own


@pytest.mark.slow
def test_a_training_that_goes_on_with_another_size_first_takes_no_graph_of_the_first_size(cache, tmp_path):
    """Photos of two sizes, one a step: each run goes on with the next photo."""
    lab = Lab(tmp_path / "lab", tiny.write_tiny_model(tmp_path / "model", blocks=(1, 1)), num_pictures=4)
    for row, size in zip(lab.captions(), ((96, 96), (96, 288), (96, 96), (96, 288))):
        path = lab.pictures / row["file_name"]
        Image.open(path).resize(size).save(path)
    lab.settle()
    lab.set("data", buckets=True, resolution=64).set("train", mode="jit", batch_size=1, steps=6).set("lora", rank=2)
    lab.encode()
    whole, broken = lab.copy(tmp_path / "whole"), lab.copy(tmp_path / "broken")
    whole.set("device", keep_compiled="never").run("TrainLoRA")
    for steps in range(1, 7):
        broken.set("train", steps=steps).said("TrainLoRA")
    weights = [each.run_folder / "pytorch_lora_weights.safetensors" for each in (whole, broken)]
    assert len(os.listdir(cache)) == 2
    assert weights[0].read_bytes() == weights[1].read_bytes()
