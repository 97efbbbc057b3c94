"""Several ranks: the bits of one, whatever trains; they stop together, and none outlives the others."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import ranked
from commands import environment, run_luigi
from hosts import Hosts
from kills import metrics_of, outcome
from lab import Lab

from pipeline.errors import UserError
from pipeline.plan.run_folder import RunFolder
from pipeline.process.peers import LOST_SECONDS
from pipeline.process.ranks import ALONE
from pipeline.process.stopping import STOPPED_EXIT
from pipeline.settings.reading import load_experiment
from pipeline.training import exchange, sharding
from pipeline.training.sharding import owners

VARIANTS = {
    "plain": {},
    "everything": {
        "lora": {"train_text_encoder": True, "dropout": 0.3},
        "data": {"buckets": True, "flip": True, "crops": 2},
        "train": {"text_encoder_lr": 1e-3, "ema_decay": 0.9, "caption_dropout": 0.3, "lr_scheduler": "cosine"},
        "prior": {"prompts": ["a circle"], "num_images": 2, "num_inference_steps": 2, "weight": 0.5},
    },
    "fp16": {"precision": {"preset": "fp16"}},
    "compiled": {"train": {"mode": "jit", "ema_decay": 0.9}, "lora": {"dropout": 0.3}},
}
SECONDS = 60
"""In which all processes must have ended: far more than they take, which is that of a step, on a busy machine."""


def lab_of(start: Lab, folder: Path, **tables) -> Lab:
    lab = start.copy(folder)
    train = {"steps": 3, "batch_size": 1, "accumulate": 4, "checkpoint_every": 2, "mode": "pynative"}
    for table, values in {**tables, "train": train | tables.get("train", {})}.items():
        lab.set(table, **values)
    return lab


# --- what a file may ask for --------------------------------------------------------------------------------------


def experiment(tmp_path, text: str):
    (tmp_path / "experiment.toml").write_text(text)
    return load_experiment(tmp_path / "experiment.toml")


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "[parallel]\nranks = 8",
            "train.accumulate = 8: 8 ranks share the batches of a step evenly, found 1; a step then has 8",
        ),
        (
            "[parallel]\nranks = 4\n[train]\naccumulate = 6",
            "train.accumulate = 8: 4 ranks share the batches of a step evenly, found 6; a step then has 8",
        ),
        ("[parallel]\nranks = 0", 'parallel.ranks: must be a whole number from 1 to 65536, or "auto", found 0'),
        ("[parallel]\nranks = true", 'parallel.ranks: must be a whole number from 1 to 65536, or "auto", found True'),
    ],
)
def test_ranks_that_cannot_share_a_step_are_refused_with_the_line_to_write(tmp_path, text, said):
    with pytest.raises(UserError) as refused:
        experiment(tmp_path, text)
    assert str(refused.value).splitlines()[1].strip().startswith(said)


def test_one_batch_on_each_of_eight_devices_is_two_lines(tmp_path):
    found = experiment(tmp_path, "[parallel]\nranks = 8\n[train]\naccumulate = 8")
    assert (found.parallel.ranks, found.train.accumulate, found.train.batch_size) == (8, 8, 1)


def test_the_number_of_ranks_is_in_an_identity_where_it_decides_bits_alone(encoded, tmp_path):
    lab = lab_of(encoded, tmp_path / "lab")
    alone = lab.plan.run_id
    assert lab.set("parallel", ranks=4).plan.run_id == alone
    assert lab.set("parallel", ranks="auto").plan.run_id == alone
    fast = [lab.set("parallel", ranks=ranks, reduce="fast").plan.run_id for ranks in (1, 2, 4)]
    assert fast[0] == alone and len({*fast}) == 3


# --- buckets ------------------------------------------------------------------------------------------------------


class Alone:
    """What a rank that has no others exchanges with them."""

    ranks = ALONE

    def gathered(self, tensor) -> list:
        return [tensor]

    def summed(self, tensor):
        return tensor


SHAPES = [(3, 4), (5,), (40,), (2, 2), (1,), (6, 1)]


def tensors(seed: int) -> list:
    import mindspore as ms

    generator = np.random.default_rng(seed)
    return [ms.Tensor(generator.standard_normal(shape).astype(np.float32)) for shape in SHAPES]


@pytest.mark.parametrize("bucket_bytes", [4, 64, 1 << 20])
@pytest.mark.parametrize("reduce", ["ordered", "fast"])
def test_gradients_come_out_of_their_buckets_as_they_went_in(cpu, monkeypatch, reduce, bucket_bytes):
    monkeypatch.setattr(exchange, "BUCKET_BYTES", bucket_bytes)
    several = [tensors(seed) for seed in range(3)]
    sums = exchange.sum_of(Alone(), reduce, several[0])
    for _ in range(2):  # the first batch of a step replaces what the step before has left
        for number, gradients in enumerate(several):
            sums.add(gradients, is_first=number == 0)
    expected = [(first + second) + third for first, second, third in zip(*several)]
    for found, wanted in zip(sums.total(), expected, strict=True):
        np.testing.assert_array_equal(found.asnumpy(), wanted.asnumpy())


@pytest.mark.parametrize("bucket_bytes", [4, 64, 1 << 20])
def test_a_share_of_an_optimizer_is_collected_whole(cpu, monkeypatch, bucket_bytes):
    monkeypatch.setattr(sharding, "BUCKET_BYTES", bucket_bytes)
    kept = tensors(0)
    found = sharding.Shards(Alone(), kept).collected(kept)
    assert list(found) == list(range(len(SHAPES)))
    for place, tensor in enumerate(kept):
        np.testing.assert_array_equal(found[place].asnumpy(), tensor.asnumpy())


# --- the bits -----------------------------------------------------------------------------------------------------


def test_two_ranks_have_the_bits_of_one(encoded, tmp_path):
    lab = lab_of(encoded, tmp_path / "lab", train={"steps": 2, "accumulate": 2})
    several = lab.copy(tmp_path / "several")
    said = ranked.run(several, ranks=2)
    assert "a step: 2 samples, 2 batches of 1, 1 on each of 2 ranks" in said
    assert outcome(several.run_folder) == outcome(lab.run("TrainLoRA").run_folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_ranks_has_the_bits_of_one(encoded, tmp_path, variant):
    lab = lab_of(encoded, tmp_path / "lab", **VARIANTS[variant])
    lab.encode()
    lab.run("DrawPrior")
    labs = {count: lab.copy(tmp_path / str(count)) for count in (2, 4)}
    alone = outcome(lab.run("TrainLoRA").run_folder)
    assert [line["step"] for line in alone["metrics"]] == [1, 2, 3]
    for count, several in labs.items():
        ranked.run(several, ranks=count)
        assert outcome(several.run_folder) == alone


@pytest.mark.slow
def test_ranks_that_share_the_optimizer_have_the_bits_and_the_checkpoint_of_one(encoded, tmp_path):
    lab = lab_of(encoded, tmp_path / "lab", **VARIANTS["everything"])
    lab.encode()
    lab.run("DrawPrior")
    other = lab.copy(tmp_path / "other").set("train", checkpoint_every=1)
    alone = outcome(lab.run("TrainLoRA").run_folder)
    process = ranked.start(other.set("parallel", ranks=4, shard_optimizer=True))
    ranked.wait_for_steps(other.run_folder, 1)
    process.terminate()
    process.wait()
    assert "going on from step" in ranked.run(other, ranks=2, shard_optimizer=True)
    assert outcome(other.run_folder) == alone


def test_shares_of_an_optimizer_are_alike_and_every_parameter_is_in_one():
    sizes = [100, 7, 50, 50, 3, 40, 9, 41]
    kept = owners(sizes, 3)
    loads = [sum(size for size, owner in zip(sizes, kept) if owner == rank) for rank in range(3)]
    assert len(kept) == len(sizes) and sum(loads) == sum(sizes) and max(loads) - min(loads) <= 9


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_a_controlnet_of_any_number_of_ranks_has_the_bits_of_one(encoded_pairs, tmp_path, mode):
    lab = lab_of(encoded_pairs, tmp_path / "lab", train={"mode": mode}).run("CheckControls")
    labs = {count: lab.copy(tmp_path / str(count)).run("CheckControls") for count in (2, 4)}
    folder = {count: each.folder / "runs" for count, each in labs.items()}
    (alone,) = lab.run("TrainControlNet").folder.glob("runs/lab-*")
    for count, several in labs.items():
        ranked.run(several, "TrainControlNet", ranks=count)
        (found,) = folder[count].glob("lab-*")
        assert outcome(found) == outcome(alone)


@pytest.mark.slow
def test_a_sum_by_the_library_is_near_that_of_one_rank_and_another_run(encoded, tmp_path):
    lab = lab_of(encoded, tmp_path / "lab")
    several = lab.copy(tmp_path / "several")
    ranked.run(several, ranks=4, reduce="fast")
    alone = lab.run("TrainLoRA").run_folder
    assert alone.name != several.run_folder.name
    losses = [[line["loss"] for line in metrics_of(folder)] for folder in (alone, several.run_folder)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_luigi_trains_by_ranks_and_hands_its_survey_on(encoded, tmp_path):
    lab = lab_of(encoded, tmp_path / "lab")
    several = lab.copy(tmp_path / "several").set("parallel", ranks=2)
    result = run_luigi("TrainLoRA", several)
    assert result.returncode == 0, result.stderr
    assert outcome(several.run_folder) == outcome(lab.run("TrainLoRA").run_folder)
    assert several.done("TrainLoRA") and several.record("TrainLoRA")["outcome"]["steps"] == 3


@pytest.mark.slow
def test_ranks_that_msrun_starts_have_the_same_bits(encoded, tmp_path):
    lab = lab_of(encoded, tmp_path / "lab")
    several = lab.copy(tmp_path / "several")
    own = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={port}", "--join=True"]
    command += [f"--log_dir={tmp_path / 'logs'}", "python", "-m", "pipeline", "run", "TrainLoRA"]
    done = subprocess.run(
        [*command, "--experiment", str(several.path)], env=own, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcome(several.run_folder) == outcome(lab.run("TrainLoRA").run_folder)


# --- life and death -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(encoded, tmp_path_factory) -> Lab:
    """A training that no test waits for."""
    return lab_of(encoded, tmp_path_factory.mktemp("long") / "lab", train={"steps": 900, "checkpoint_every": 0})


@pytest.fixture
def running(long, tmp_path):
    """Two ranks that have taken a step: the lab, the process that started them, and all their processes."""
    lab = long.copy(tmp_path / "lab").set("parallel", ranks=2)
    process = ranked.start(lab)
    try:
        ranked.wait_for_steps(lab.run_folder, 1)
        yield lab, process, ranked.processes(lab)
    finally:
        ranked.end(process, lab)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, ranked.SCHEDULER])
def test_where_one_is_killed_all_end_with_an_error(running, victim):
    lab, process, pids = running
    os.kill(pids[victim], signal.SIGKILL)
    assert ranked.seconds_until_gone(pids.values()) < SECONDS
    said = process.communicate()[0]
    assert process.returncode == 1 and "ended first, and the others with it" in said


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1, "runner"])
def test_where_one_is_asked_to_stop_all_keep_the_same_step(running, asked):
    lab, process, pids = running
    os.kill(pids[asked], signal.SIGTERM)
    assert ranked.seconds_until_gone(pids.values()) < SECONDS
    said = process.communicate()[0]
    assert process.returncode in (STOPPED_EXIT, 130) and "what was finished is kept" in said
    (checkpoint,) = RunFolder(lab.run_folder).list_checkpoints()
    assert checkpoint == RunFolder(lab.run_folder).checkpoint(metrics_of(lab.run_folder)[-1]["step"])


@pytest.mark.slow
def test_where_who_started_them_is_killed_they_stop_and_nothing_is_left(running):
    lab, process, pids = running
    process.kill()
    assert ranked.seconds_until_gone(pids.values()) < SECONDS
    assert len(RunFolder(lab.run_folder).list_checkpoints()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (4, 2)])
def test_a_run_stopped_on_some_ranks_is_finished_on_others(encoded, tmp_path, counts):
    lab = lab_of(encoded, tmp_path / "lab", train={"steps": 6, "checkpoint_every": 0})
    other = lab.copy(tmp_path / "other").set("parallel", ranks=counts[0])
    process = ranked.start(other)
    ranked.wait_for_steps(other.run_folder, 1)
    process.terminate()
    process.wait()
    assert not other.done("TrainLoRA") and RunFolder(other.run_folder).list_checkpoints()
    assert "going on from step" in ranked.run(other, ranks=counts[1])
    assert outcome(other.run_folder) == outcome(lab.run("TrainLoRA").run_folder)


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_at_random_ends_as_the_unbroken_one(encoded, tmp_path):
    lab = lab_of(encoded, tmp_path / "lab", train={"steps": 8, "checkpoint_every": 1})
    other = lab.copy(tmp_path / "other")
    unbroken = outcome(lab.run("TrainLoRA").run_folder)
    draw = random.Random(0)
    for step in (1, 3, 4, 6):
        process = ranked.start(other.set("parallel", ranks=draw.choice([2, 4])))
        ranked.wait_for_steps(other.run_folder, step)
        pids = ranked.processes(other)
        threading.Event().wait(draw.uniform(0, 1))
        os.kill(pids[draw.choice(list(pids))], signal.SIGKILL)
        assert ranked.seconds_until_gone(pids.values()) < SECONDS
        process.communicate()
    ranked.run(other, ranks=2)
    assert outcome(other.run_folder) == unbroken


# --- several hosts ------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts():
    with Hosts() as found:
        yield found


@pytest.mark.slow
def test_ranks_on_two_hosts_have_the_same_bits(encoded, tmp_path, hosts):
    lab = lab_of(encoded, tmp_path / "lab", **VARIANTS["everything"])
    lab.encode()
    lab.run("DrawPrior")
    several = lab.copy(tmp_path / "several").set("parallel", shard_optimizer=True)
    for host in [hosts.msrun(number, several) for number in (0, 1)]:
        said, _ = host.communicate(timeout=600)
        assert host.returncode == 0, said
    assert outcome(several.run_folder) == outcome(lab.run("TrainLoRA").run_folder)
    assert not RunFolder(several.run_folder).meeting.exists()


@pytest.fixture
def on_two_hosts(long, tmp_path, hosts):
    """A rank on each of two hosts, which have taken a step: the lab, both msruns, and the ranks' processes."""
    lab = long.copy(tmp_path / "lab")
    started = [hosts.msrun(number, lab) for number in (0, 1)]
    try:
        ranked.wait_for_steps(lab.run_folder, 1)
        yield lab, started, ranked.processes(lab)
    finally:
        for process in started:
            ranked.end(process, lab)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_host_is_killed_the_other_ends(on_two_hosts, victim):
    lab, started, pids = on_two_hosts
    started[victim].kill()
    os.kill(pids[victim], signal.SIGKILL)
    assert ranked.seconds_until_gone([pids[1 - victim]]) < SECONDS
    assert started[1 - victim].wait(SECONDS) == 1


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_where_one_host_is_asked_to_stop_both_keep_the_same_step(on_two_hosts, asked):
    lab, _, pids = on_two_hosts
    os.kill(pids[asked], signal.SIGTERM)
    assert ranked.seconds_until_gone([pids[0], pids[1]]) < SECONDS
    (checkpoint,) = RunFolder(lab.run_folder).list_checkpoints()
    assert checkpoint == RunFolder(lab.run_folder).checkpoint(metrics_of(lab.run_folder)[-1]["step"])


@pytest.mark.slow
def test_a_host_that_is_lost_is_noticed_by_the_other(on_two_hosts, hosts):
    _, started, pids = on_two_hosts
    hosts.cut()
    assert ranked.seconds_until_gone([pids[0], pids[1]]) < LOST_SECONDS + SECONDS
    assert [process.wait(SECONDS) for process in started] == [1, 1]
