"""Surveys: photos are found once, by whoever asks first, and handed on; what is then read is still checked."""

import gc
import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import luigi
import pytest
from lab import Lab
from photo_files import metadata, photo
from PIL import Image

import tasks
from cache import FileFacts, caption_item
from pipeline import stages
from pipeline.data import indexing, photos, survey_file
from pipeline.data.indexing import IndexedPhoto, by_content, index_pairs, index_photos
from pipeline.data.survey_file import SurveyFile
from pipeline.errors import UserError
from pipeline.methods import CONTROLNET, LORA
from pipeline.plan import survey
from pipeline.plan.survey import Survey
from pipeline.process import children
from pipeline.process.bulk import made_in_bulk
from pipeline.settings.reading import load_experiment
from tasks import table

ROOT = Path(__file__).parents[1]
OF = {"version": survey_file.VERSION, "folder": "/photos", "prompt": "", "with_conditions": False}


def indexed(number: int, **more) -> IndexedPhoto:
    name, caption = f"süß/{number}.png", f"ein Käse 🧀, number {number % 3}"
    return IndexedPhoto("/photos", name, caption, f"{number:032x}", 40 + number, 30, **more)


PHOTOS = tuple(indexed(number) for number in range(7))


def pair(number: int, condition: IndexedPhoto) -> IndexedPhoto:
    return indexed(number, conditioning=condition.name, condition=condition)


def written(found, of=OF) -> bytes:
    file = io.BytesIO()
    survey_file.write(file, of, found)
    return file.getvalue()


def written_to(path: Path, found, of=OF) -> Path:
    path.write_bytes(written(found, of))
    return path


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found",
    [
        PHOTOS,
        (indexed(1, conditioning="edges/1.png"), indexed(2)),
        tuple(pair(number, indexed(10 + number)) for number in range(5)),
        (pair(1, indexed(9)), pair(2, indexed(9)), pair(3, indexed(1)._replace(caption=""))),
        (indexed(1, profile="Display P3"), pair(2, indexed(8, ignored="cut")), pair(3, indexed(9, profile="RGB"))),
    ],
    ids=["photos", "conditions by name", "conditions", "a condition of two, and one that is a photo too", "colours"],
)
def test_a_survey_survives_its_file(tmp_path, found):
    assert survey_file.read(written_to(tmp_path / "survey", found), OF) == found


def test_photos_read_from_a_survey_share_what_they_have_in_common(tmp_path):
    one, *_, other = survey_file.read(written_to(tmp_path / "survey", PHOTOS), OF)
    assert one.caption is other.caption and one.folder is other.folder


@pytest.mark.parametrize(
    "other", [{"folder": "/others"}, {"prompt": "a cat"}, {"with_conditions": True}, {"version": 0}]
)
def test_a_survey_of_something_else_is_refused(tmp_path, other):
    path = written_to(tmp_path / "survey", PHOTOS, OF | other)
    with pytest.raises(UserError, match="survey: a survey of .*, expected one of .*; run again without it"):
        survey_file.read(path, OF)


def test_a_survey_that_is_cut_short_anywhere_is_refused(tmp_path):
    content = written(PHOTOS)
    for size in range(len(content)):
        (tmp_path / "survey").write_bytes(content[:size])
        with pytest.raises(UserError, match="survey: damaged, and no survey"):
            survey_file.read(tmp_path / "survey", OF)


def test_a_damaged_column_and_a_missing_survey_are_said_in_one_line(tmp_path):
    lines = written(PHOTOS).splitlines(keepends=True)
    for content in (b"[1, 2]\n", b"nothing\n", b"[]\n"):
        (tmp_path / "survey").write_bytes(b"".join([*lines[:2], content, *lines[3:]]))
        with pytest.raises(UserError, match="damaged"):
            survey_file.read(tmp_path / "survey", OF)
    with pytest.raises(UserError, match="none: cannot read this survey: No such file"):
        survey_file.read(tmp_path / "none", OF)


# --- shared by processes ------------------------------------------------------------------------------------------


def test_whoever_asks_second_waits_for_the_first_and_looks_at_nothing():
    file, looks, may_end = SurveyFile(), [], threading.Event()

    def look():
        looks.append(1)
        may_end.wait(10)
        return PHOTOS

    with ThreadPoolExecutor(3) as pool:
        several = [pool.submit(file.photos, OF, look) for _ in range(3)]
        time.sleep(0.2)
        may_end.set()
        assert [each.result() for each in several] == [PHOTOS] * 3
    assert len(looks) == 1


def test_what_is_not_known_yet_is_looked_at_again():
    file = SurveyFile()
    assert file.photos(OF, lambda: None) is None
    assert file.photos(OF, lambda: PHOTOS) == file.photos(OF, lambda: None) == PHOTOS


def test_what_a_killed_process_has_half_written_is_surveyed_again():
    file = SurveyFile()
    with open(file.path, "wb") as half:
        half.write(written(PHOTOS[:3] * 100)[:-5])
    assert file.photos(OF, lambda: PHOTOS) == PHOTOS
    assert survey_file.read(file.path, OF) == PHOTOS


def test_a_forked_process_and_a_child_find_what_another_fork_has_left():
    """Without MindSpore, whose threads do not survive a fork."""
    code = """if True:
        import os, subprocess, sys
        from pipeline.data import survey_file
        from pipeline.data.indexing import IndexedPhoto
        of, photo = {"folder": "/photos"}, IndexedPhoto("/photos", "a.png", "a cat", "0" * 32, 8, 6)
        file = survey_file.SurveyFile()
        if (fork := os.fork()) == 0:
            file.photos(of, lambda: (photo,))
            os._exit(0)
        os.waitpid(fork, 0)
        assert file.photos(of, lambda: 1 / 0) == (photo,)
        print(subprocess.run(["wc", "-l", file.path], pass_fds=[file.fileno()], capture_output=True, text=True).stdout)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[0] == "11", done.stderr


def test_where_it_cannot_be_kept_every_process_looks_for_itself(tmp_path):
    """As on a full disk: no file may become larger than a kilobyte."""
    code = """if True:
        import resource
        from pipeline.data import survey_file
        from pipeline.data.indexing import IndexedPhoto
        photos = tuple(IndexedPhoto("/photos", f"{number}.png", "a cat", "0" * 32, 8, 6) for number in range(1000))
        file = survey_file.SurveyFile()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        assert [file.photos({}, lambda: photos) for _ in range(2)] == [photos] * 2 and not file.is_whole
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = f"{tmp_path}: cannot keep what is known of 1,000 photos (File too large); every stage looks at them itself"
    assert done.stderr.splitlines() == [said] * 2 and list(tmp_path.iterdir()) == []


def test_what_is_made_in_bulk_is_not_looked_through_and_all_else_is():
    with pytest.raises(ZeroDivisionError), made_in_bulk():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()


# --- an experiment ------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(encoded, tmp_path) -> Lab:
    """Encoded; but what it now asks for differs in the length of prompts and the size of pictures."""
    return encoded.copy(tmp_path / "lab").set("data", max_sequence_length=24, resolution=16)


@pytest.fixture
def listed(monkeypatch) -> list[str]:
    """Who has listed a folder of photos: a survey, or a stage for itself."""
    calls, do_list = [], photos.list_photos
    for module, who in ((survey, "survey"), (indexing, "stage")):
        monkeypatch.setattr(module, "list_photos", lambda *given, who=who: (calls.append(who), do_list(*given))[1])
    return calls


def handed_on(lab: Lab) -> str:
    """The file of a survey of the lab's photos as they are now."""
    path = lab.folder / "survey"
    return str(written_to(path, Survey(lab.experiment).photos(LORA), survey_file.subject(lab.experiment, False)))


def test_a_stage_that_is_given_a_survey_does_not_look_at_the_folder(lab, listed):
    path, captions = handed_on(lab), {row["text"] for row in lab.captions()}
    lab.pictures.rename(lab.folder / "elsewhere")
    stages.run("EncodeT5", lab.experiment, path)
    assert lab.plan.txt.missing(map(caption_item, captions)) == [] and listed == ["survey"]
    with pytest.raises(UserError, match="pictures: no such folder"):
        stages.run("EncodeT5", lab.experiment)


def test_a_photo_that_changes_after_the_survey_is_an_error_and_never_an_entry(lab):
    path, changed = handed_on(lab), Survey(lab.experiment).photos(LORA)[1]
    Image.new("RGB", (48, 48), "red").save(changed.path)
    with pytest.raises(UserError, match=f"{changed.name}: changed since the photos were indexed; start again"):
        stages.run("EncodeImages", lab.experiment, path)
    (need,) = lab.plan.of([changed]).image_needs
    assert need.entries.missing([changed.digest]) == [changed.digest]
    assert not stages.is_done("EncodeImages", Survey(lab.experiment))


def test_a_stage_refuses_the_survey_of_another_prompt(lab):
    path = handed_on(lab)
    with pytest.raises(UserError, match="expected one of .*'prompt': 'a cat'"):
        stages.run("EncodeT5", lab.set("data", prompt="a cat").experiment, path)


def test_a_survey_is_the_index_in_the_order_of_training(lab):
    experiment = lab.experiment
    facts = FileFacts(lab.folder / "store" / "facts.sqlite")
    assert Survey(experiment).photos(LORA) == by_content(index_photos(experiment.images, "", facts))


def test_a_folder_is_listed_once_for_photos_and_for_pairs(paired, tmp_path, listed):
    lab = paired.copy(tmp_path / "lab")
    listed.clear()
    assert Survey(lab.experiment).photos(CONTROLNET) is None and listed == ["survey"]
    lab.run("CheckControls")
    listed.clear()
    found = Survey(lab.experiment)
    facts = FileFacts(lab.folder / "store" / "facts.sqlite")
    assert found.photos(CONTROLNET) == by_content(index_pairs(lab.experiment.images, "", facts))
    assert [pair._replace(condition=None) for pair in found.photos(CONTROLNET)] == list(found.photos(LORA))
    assert listed == ["survey", "stage"]


# --- Luigi --------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch) -> list[tuple[str, bool]]:
    """The stages that Luigi started, and whether each was given a survey; they run in this process."""
    calls = []

    def started_here(task, arguments, files):
        command, stage, *options = arguments
        options = dict(zip(options[::2], options[1::2]))
        calls.append((stage, "--survey" in options))
        stages.run(stage, load_experiment(options["--experiment"]), options.get("--survey", ""))

    monkeypatch.setattr(table.StageTask, "_started", started_here)
    monkeypatch.setattr(children, "waited_for", lambda child, grace_seconds: 0)
    return calls


def build(lab: Lab) -> bool:
    several = tasks.EncodeCLIP, tasks.EncodeT5, tasks.EncodeImages
    return luigi.build([task(str(lab.path)) for task in several], local_scheduler=True)


def test_luigi_lists_the_photos_once_for_all_stages(lab, listed, started):
    assert build(lab.set("sample", prompts=["another caption"]))
    assert sorted(started) == [("EncodeCLIP", True), ("EncodeImages", True), ("EncodeT5", True)]
    assert listed == ["survey"]


def test_luigi_lists_them_again_once_new_photos_are_known(lab, listed, started):
    rows = lab.captions()
    Image.new("RGB", (48, 48), "red").save(lab.pictures / "new.png")
    lab.write_captions([*rows, {"file_name": "new.png", "text": rows[0]["text"]}])
    lab.settle()
    assert build(lab)
    assert started[0] == ("CheckData", False) and all(is_given for _, is_given in started[1:])
    assert listed == ["survey", "stage", "survey"]
    assert len(tasks.survey(str(lab.path)).photos(LORA)) == len(rows) + 1


def test_an_experiment_file_that_changes_is_surveyed_anew(lab):
    first = tasks.survey(str(lab.path))
    assert tasks.survey(str(lab.path)) is first
    lab.set("train", learning_rate=0.5)
    assert tasks.survey(str(lab.path)).experiment.train.learning_rate == 0.5


def test_what_is_known_stays_and_what_is_not_is_looked_at_again(lab, listed):
    first = Survey(lab.experiment)
    assert first.photos(LORA) is not None and first.anew().photos(LORA) is first.photos(LORA) and listed == ["survey"]
    photo(lab.pictures, "new.png")
    metadata(lab.pictures, *lab.captions(), {"file_name": "new.png", "text": "new"})
    second = Survey(lab.experiment)
    assert second.photos(LORA) is None
    lab.run("CheckData")
    assert second.photos(LORA) is None and len(second.anew().photos(LORA)) == len(first.photos(LORA)) + 1
