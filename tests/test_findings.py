"""What CheckData says of a folder that holds each kind of fault: in the table, as JSON, and with [data] strict."""

import json
from pathlib import Path
from typing import get_args

import pytest
from photo_files import age, photo
from PIL import Image
from terminals import terminal

from pipeline import checks, commands, stages
from pipeline.data.findings import MOST_NAMED, findings
from pipeline.data.indexing import IndexedPhoto
from pipeline.errors import UserError
from pipeline.flux import models
from pipeline.methods import LORA
from pipeline.plan.caption_lengths import is_surely_short
from pipeline.plan.plan import resolve
from pipeline.plan.survey import Survey
from pipeline.settings.experiment import EMBEDDED
from pipeline.settings.fields import Data
from pipeline.settings.reading import load_experiment
from pipeline.settings.values import FindingKind

EXPECTED = {
    "cut-by-clip": (2, "longest.png", "77 of 362 tokens used"),
    "cut-by-t5": (2, "longest.png", "128 of 361 tokens used"),
    "enlarged": (1, "small.png", "3.2 x, from 20 x 30 px"),
    "cropped": (1, "wide.png", "77% of 300 x 70 px"),
    "twice": (2, "one.png", "same as two.png"),
    "profile-ignored": (1, "profile.png", "cannot be used: cannot open profile from string"),
    "caption-repeated": (2, "alike-a.png", '2 photos: "a photo of sks"'),
    "control-characters": (1, "nul.png", "NUL"),
    "several-lines": (1, "lines.png", "3 lines"),
    "blank": (1, "blank.png", r"\u200b"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """An experiment file beside a folder with each kind of fault, and one photo without any."""
    folder = tmp_path_factory.mktemp("faulty")
    make_faulty(folder / "photos")
    return experiment_in(folder)


def make_faulty(photos: Path) -> None:
    for name, caption, size in (
        ("sound", "a red circle", (72, 72)),
        ("long", "a red circle on white, " * 40, (64, 64)),
        ("longest", "a red circle on green, " * 60, (70, 64)),
        ("small", "a small one", (20, 30)),
        ("wide", "a wide one", (300, 70)),
        ("one", "a photo", (66, 66)),
        ("alike-a", "a photo of sks", (64, 67)),
        ("alike-b", "a photo of sks", (67, 64)),
        ("nul", "a red\0circle", (68, 64)),
        ("lines", "red\ncircle\r\n\r\nwhite", (69, 64)),
        ("blank", "\u200b", (73, 64)),
        ("profile", "dull colours", (74, 64)),
    ):
        photo(photos, f"{name}.png", caption, size)
    Image.open(photos / "profile.png").save(photos / "profile.png", icc_profile=b"not a profile")
    (photos / "two.png").write_bytes((photos / "one.png").read_bytes())
    (photos / "two.txt").write_text("the same photo again")
    age(photos / "two.png")
    age(photos / "profile.png")


def experiment_in(folder: Path, **data) -> Path:
    settings = {"images": "photos", "resolution": 64, "max_sequence_length": 128} | data
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    path = folder / f"{'-'.join(data) or 'plain'}.toml"
    path.write_text("\n".join(["[data]", *lines]) + "\n")
    return path


def test_each_kind_of_fault_is_found_and_counted(faulty):
    photos = checks.look_at_data(load_experiment(faulty))
    found = {each.kind: (each.count, *each.worst[0]) for each in photos.findings}
    assert found == EXPECTED and tuple(found) == get_args(FindingKind)
    assert photos.num_photos == 13 and photos.num_captions == 12 and photos.are_tokens_counted


def test_the_table_fits_80_columns(faulty, capsys):
    with terminal(80) as screen:
        assert commands.main(["data", str(faulty)]) == 0
    text = " ".join(" ".join(screen.lines).split())
    assert max(map(len, screen.lines)) <= 80
    for title in ("captions cut by T5", "photos enlarged", "more than half cut off", "control characters"):
        assert title in text
    assert "128 of 361 tokens used" in text and "T5's tokenizer does not take a line break for a space" in text
    assert "\0" not in screen.raw and "\u200b" not in screen.raw


def test_a_log_has_a_line_for_each_photo_that_is_named(faulty, capsys):
    stages.run("CheckData", load_experiment(faulty))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("13 captioned photos, all can be used; look at this:")
    (row,) = [line.split() for line in lines if line.startswith("captions cut by T5  ")]
    assert row == ["captions", "cut", "by", "T5", "2", "longest.png", "128", "of", "361", "tokens", "used"]
    assert not any("\x1b" in line for line in lines)


def test_as_json(faulty, capsys):
    assert commands.main(["data", "--json", str(faulty)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == str(faulty.parent / "photos") and found["are_tokens_counted"]
    (cut,) = [each for each in found["findings"] if each["kind"] == "cut-by-t5"]
    assert cut["count"] == 2 and cut["worst"][1] == {"name": "long.png", "what": "128 of 241 tokens used"}


def test_strict_makes_one_error_of_all_of_it(faulty, capsys):
    experiment = load_experiment(experiment_in(faulty.parent, strict=True))
    with pytest.raises(UserError) as error:
        stages.run("CheckData", experiment)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("10 kinds of faults that [data] strict forbids; mend what is listed, or change strict")
    for _, name, what in EXPECTED.values():
        assert f"    {name}: {what}" in lines
    assert not stages.is_done("CheckData", Survey(experiment))  # though every photo is known by now
    assert commands.main(["data", str(faulty.parent / "strict.toml")]) == 1
    assert stages.is_done("CheckData", Survey(load_experiment(faulty)))


def test_strict_makes_errors_of_the_kinds_it_names(faulty, capsys):
    path = experiment_in(faulty.parent, strict=["cut-by-t5", "twice"])
    with pytest.raises(UserError) as error:
        stages.run("CheckData", load_experiment(path))
    first, *lines = str(error.value).splitlines()
    assert "2 kinds of faults" in first and [line.strip().partition(":")[0] for line in lines] == [
        *("captions cut by T5 (cut-by-t5)", "longest.png", "long.png"),
        *("photos more than once (twice)", "one.png"),
    ]
    assert not stages.is_done("CheckData", Survey(load_experiment(path)))
    assert commands.main(["data", str(path)]) == 1
    assert "photos enlarged" in capsys.readouterr().out


def test_strict_lets_pass_what_it_does_not_name(tmp_path, capsys):
    photo(tmp_path / "photos", "small.png", "a red circle", (20, 20))
    path = experiment_in(tmp_path, strict=["cut-by-t5", "twice"])
    stages.run("CheckData", load_experiment(path))
    assert "photos enlarged" in capsys.readouterr().out
    assert stages.is_done("CheckData", Survey(load_experiment(path))) and commands.main(["data", str(path)]) == 0


@pytest.mark.parametrize("strict", [True, ["cut-by-clip", "cut-by-t5"]])
def test_strict_refuses_cut_captions_once_the_model_is_here(tmp_path, strict):
    photo(tmp_path / "photos", "long.png", "a red circle on white, " * 40, (64, 64))
    experiment = load_experiment(experiment_in(tmp_path, strict=strict))
    with pytest.raises(UserError, match="2 kinds of faults"):
        stages.run("CheckData", experiment)
    assert stages.is_done("CheckData", Survey(experiment))  # as far as is known without tokens
    assert not stages.is_done("CheckRoom", Survey(experiment))
    with pytest.raises(UserError, match=r"captions cut by T5 \(cut-by-t5\): 1 photo; "):
        checks.check_captions(resolve(experiment, LORA))


def test_strict_passes_a_sound_folder(tmp_path, capsys):
    photo(tmp_path / "photos", "sound.png", "a red circle", (64, 64))
    experiment = load_experiment(experiment_in(tmp_path, strict=True))
    stages.run("CheckData", experiment)
    assert capsys.readouterr().out.endswith("1 captioned photo, all sound\n")
    assert stages.is_done("CheckData", Survey(experiment)) and stages.is_done("CheckRoom", Survey(experiment))


def test_strict_changes_no_identity(faulty):
    several = [False, True, ["cut-by-t5", "twice"]]
    plans = [resolve(load_experiment(experiment_in(faulty.parent, strict=strict)), LORA) for strict in several]
    assert len({plan.run_id for plan in plans}) == 1


def test_without_the_model_cut_captions_are_said_to_be_unknown(faulty, tmp_path, capsys):
    path = tmp_path / "absent.toml"
    images = json.dumps(str(faulty.parent / "photos"))
    path.write_text(f"model.path = 'nobody/nothing'\n[data]\nimages = {images}\nresolution = 64\n")
    stages.run("CheckData", load_experiment(path))
    out = capsys.readouterr().out
    assert "captions that may be cut" in out and "known after GetModel" in out and "tokens used" not in out


def test_check_room_says_which_captions_are_cut(faulty, capsys):
    checks.say_cut_captions(resolve(load_experiment(faulty), LORA))
    out = capsys.readouterr().out
    assert "77 of 362 tokens used" in out and "photos enlarged" not in out


def test_a_prompt_for_all_is_no_repeated_caption():
    photos = [photo_of(number, caption="sks") for number in range(3)]
    assert findings(photos, Data(resolution=64, prompt="sks")) == []
    assert [each.kind for each in findings(photos, Data(resolution=64))] == ["caption-repeated"]


def test_photos_of_one_file_do_not_count_as_a_repeated_caption():
    photos = [photo_of(1, name=name, caption="sks") for name in "ab"]
    assert [each.kind for each in findings(photos, Data(resolution=64))] == ["twice"]


def test_all_are_counted_and_the_worst_are_named():
    photos = [photo_of(number, width=10 + number) for number in range(200)]
    (enlarged,) = [each for each in findings(photos, Data(resolution=512)) if each.kind == "enlarged"]
    assert enlarged.count == 200 and len(enlarged.worst) == MOST_NAMED
    assert enlarged.worst[0].what == "51 x, from 10 x 1000 px"


def test_buckets_and_several_resolutions_are_what_counts():
    photos = [photo_of(1, width=1000, height=400)]

    def kinds(**data):
        return [each.kind for each in findings(photos, Data(**data))]

    assert kinds(resolution=256) == ["cropped"] and kinds(resolution=256, buckets=True) == []
    assert kinds(resolution=(256, 512)) == ["enlarged", "cropped"]


def photo_of(number: int, name: str = "", caption: str = "", width: int = 1000, height: int = 1000) -> IndexedPhoto:
    names = name or f"{number}.png", caption or f"number {number}"
    return IndexedPhoto("/photos", *names, f"{number:032x}", width, height)


@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2"])
def test_a_caption_that_is_surely_short_is_short(component):
    """The captions that make the most tokens of their characters."""
    tokenizer = models.load_tokenizer(EMBEDDED, component)
    for caption in ("x" * 30, "#" * 30, "A B " * 7 + "AB", " .,;!?'" * 4 + "~~", "Z\tq\nJ" * 6, "\x01" * 30, "7" * 30):
        limit = len(tokenizer(caption).input_ids)
        assert not is_surely_short(caption, limit - 1)
        assert is_surely_short(caption, len(caption) + 2) and limit <= len(caption) + 2


def test_letters_that_become_many_tokens_are_not_taken_for_short():
    assert not is_surely_short("\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}", 512)
