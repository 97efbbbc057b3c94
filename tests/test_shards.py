"""Encoding in shards: together they make what one process makes, and nothing twice."""

import contextlib
import fcntl
import json
import os
import threading

import luigi
import pytest
from drawn import latents_of
from lab import ENCODERS, Lab

import tasks
from pipeline import records, stage_table, stages
from pipeline.errors import UserError
from pipeline.plan import needs, pictures
from pipeline.plan.shard import WHOLE, Shard
from pipeline.process import claims
from pipeline.process.claims import claimed

TWO = Shard.all_of(2)


def record_of(lab: Lab, stage: str, shard: Shard) -> dict:
    plan = lab.plan
    folder = stage_table.STAGES[stage].place(plan)
    return json.loads(records.path_of(stage, folder, shard).read_text())


def items_and_bytes(lab: Lab) -> dict:
    entries = lab.plan.store.entries
    return {
        (need.stage, item): entries(need.recipe).read(item).tobytes()
        for need in needs.encoded(lab.plan)
        for item in need.items
    }


def num_rows(lab: Lab) -> int:
    """The rows of the store, those that are held twice counted twice."""
    plan = lab.plan
    several = [plan.pooled, plan.txt, *(need.entries for need in plan.image_needs)]
    return sum(segment.num_rows for entries in several for segment in entries.index().segments)


def test_shards_together_encode_what_one_process_does_and_nothing_twice(encoded, tmp_path, capsys):
    lab = Lab(tmp_path / "lab", encoded.model, num_pictures=7).run("CheckData")
    for stage in ENCODERS:
        for shard in TWO:
            assert not lab.done(stage) and not stages.is_done(stage, stages.Survey(lab.experiment), shard)
            stages.run(stage, lab.experiment, shard=shard)
            assert stages.is_done(stage, stages.Survey(lab.experiment), shard)
        assert lab.done(stage)
        several = [record_of(lab, stage, shard) for shard in TWO]
        counts = [record["outcome"]["encoded"] for record in several]
        assert counts == [record["inputs"]["items"] for record in several] and min(counts) > 0 and sum(counts) == 7
    alone = encoded.copy(tmp_path / "alone")
    both = items_and_bytes(alone)
    assert {key: items_and_bytes(lab)[key] for key in both} == both and num_rows(lab) == 3 * 7
    stages.run("EncodeImages", lab.experiment, shard=TWO[0])
    assert "EncodeImages shard 0/2: done already" in capsys.readouterr().out and num_rows(lab) == 3 * 7
    assert record_of(lab, "EncodeImages", TWO[0])["outcome"]["encoded"] > 0


def test_a_stage_is_one_task_or_one_for_each_shard(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab")
    path = str(lab.path)
    assert luigi.task.flatten(tasks.EncodeT5(path).requires()) == [tasks.CheckRoom(path)]
    lab.set("parallel", encoders=3)
    for stage, room in (("EncodeT5", tasks.CheckRoom), ("EncodeControls", tasks.CheckControlNetRoom)):
        shards = luigi.task.flatten(tasks.TASKS[stage](path).requires())
        assert [(each.task_family, each.shard) for each in shards] == [(f"{stage}Shard", f"{n}/3") for n in range(3)]
        assert all(each.requires() == [room(path)] and each.complete() == (stage == "EncodeT5") for each in shards)


def test_shards_together_draw_what_one_process_does(lora_trained, lora_sampled, tmp_path):
    lab = lora_trained.copy(tmp_path / "lab")
    counts = []
    for shard in Shard.all_of(3):
        assert not lab.done("SampleLatents")
        stages.run("SampleLatents", lab.experiment, shard=shard)
        path = records.path_of("SampleLatents", lab.run_folder, shard)
        counts.append(json.loads(path.read_text())["outcome"]["drawn"] if path.exists() else 0)
    assert lab.done("SampleLatents") and sum(counts) == 4 and max(counts) < 4
    for name in (pictures.BASE, pictures.TRAINED):
        assert (latents_of(lab, name) == latents_of(lora_sampled, name)).all()
    decoded = [
        {path.name: path.read_bytes() for path in each.run("Sample").run_folder.glob("samples/*.png")}
        for each in (lab, lora_sampled)
    ]
    assert decoded[0] == decoded[1] and decoded[0]


@pytest.mark.parametrize("text", ["2/2", "0/0", "1", "-1/2", "1/2/3", "a/b", ""])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UserError, match="must be I/N"):
        Shard.parse(text)


def test_a_stage_that_is_not_divided_is_not_run_in_part(lab_without_work):
    with pytest.raises(UserError, match="TrainLoRA is not divided .* EncodeCLIP, EncodeT5"):
        stages.run("TrainLoRA", lab_without_work.experiment, shard=TWO[0])
    assert not (lab_without_work.folder / "runs").exists()


@pytest.fixture
def lab_without_work(tmp_path) -> Lab:
    return Lab(tmp_path / "lab", tmp_path / "no model")


def test_each_item_is_in_one_shard_and_all_are_in_the_whole():
    items = [f"{number * 0x9E3779B97F4A7C15:032x}" for number in range(300)]
    shards = [[item for item in items if item in shard] for shard in Shard.all_of(4)]
    assert sorted(item for shard in shards for item in shard) == sorted(items) and min(map(len, shards)) > 50
    assert all(item in WHOLE for item in items)


# --- claims -------------------------------------------------------------------------------------------------------


def test_one_process_works_at_a_claim_and_the_next_waits_for_it(tmp_path, capsys):
    order = []
    with claimed(tmp_path / "new" / "claim", "work"):
        other = threading.Thread(target=_note_when_had, args=(tmp_path / "new" / "claim", order))
        other.start()
        other.join(0.5)
        order.append("first")
    other.join(30)
    assert order == ["first", "other"] and "work: another process is at it; waiting" in capsys.readouterr().err


def test_whoever_shows_no_sign_of_life_is_not_waited_for(tmp_path, monkeypatch, capsys):
    """As a paused process does not."""
    monkeypatch.setattr(claims, "STILL_SECONDS", 0.3)
    monkeypatch.setattr(claims, "SIGN_SECONDS", 0.2)
    order = []
    with contextlib.closing(open(tmp_path / "claim", "wb")) as paused:
        fcntl.flock(paused, fcntl.LOCK_EX)
        _note_when_had(tmp_path / "claim", order)
    assert order == ["other"] and "going on without it" in capsys.readouterr().err


def test_whoever_lives_is_waited_for_however_long_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "STILL_SECONDS", 0.5)
    monkeypatch.setattr(claims, "SIGN_SECONDS", 0.1)
    order = []
    with claimed(tmp_path / "claim", "work"):
        other = threading.Thread(target=_note_when_had, args=(tmp_path / "claim", order))
        other.start()
        other.join(1.5)
        order.append("first")
    other.join(30)
    assert order == ["first", "other"]


def test_a_claim_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(stages.StoreError, match="file/claim"), claimed(tmp_path / "file" / "claim", "work"):
        pass


def _note_when_had(path: os.PathLike, order: list[str]) -> None:
    with claimed(path, "work"):
        order.append("other")
