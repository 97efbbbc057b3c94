"""`python -m cache export`: entries as safetensors."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from pairs import encode, plan_of
from test_cache_store import ITEMS, array_of, entries_of, fill
from tools import NASTY, damage_row, fresh, image, need_of, run

from cache import (
    Entries,
    Source,
    Store,
    StoreError,
    caption_item,
    collect,
)
from cache.tools import experiments
from cache.tools.export import export


def bits(array):
    """The numbers as they are stored: MindSpore, where it is imported, has a bfloat16 of its own, equal to no other."""
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_safetensors_reads_what_was_exported(tmp_path, dtype, shape):
    captions = ["a cat", NASTY, "\0\\u0041", "", "猫" * 300]
    entries = entries_of(tmp_path / "store", dtype, shape, kind="txt")
    sources = [Source(caption_item(caption), f"{number}.png", caption) for number, caption in enumerate(captions)]
    with entries.writer() as writer:
        for number, source in enumerate(sources):
            writer.write(source.item, array_of(entries, number))
    path = tmp_path / "prompts.safetensors"
    export(Store(tmp_path / "store"), [need_of(entries, *sources)], "prompts", path)

    found = safetensors.numpy.load_file(path)
    assert sorted(found) == sorted(captions)
    for number, caption in enumerate(captions):
        assert found[caption].dtype.name == dtype and found[caption].shape == shape
        np.testing.assert_array_equal(bits(found[caption]), bits(array_of(entries, number)))
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
        np.testing.assert_array_equal(bits(file.get_tensor(NASTY)), bits(array_of(entries, 1)))
    assert metadata | {"recipe": None} == {"kind": "prompts", "recipe_id": entries.id, "recipe": None}
    assert json.loads(metadata["recipe"]) == entries.recipe
    assert list(tmp_path.iterdir()).count(path) == 1 and len(list(tmp_path.iterdir())) == 2


def test_an_export_is_the_same_bytes_in_any_order(tmp_path):
    entries = fill(entries_of(tmp_path / "store"))
    for name, order in (("a", range(9)), ("b", reversed(range(9)))):
        export(Store(tmp_path / "store"), [need_of(entries, *map(image, order))], "latents", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header_bytes = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0 and (tmp_path / "a").stat().st_size == 8 + header_bytes + 9 * 24


def test_what_is_being_exported_is_not_collected(tmp_path, monkeypatch):
    entries, read = fill(entries_of(tmp_path / "store"), max_items=8), Entries.read

    def read_beside_a_collector(self, item):
        collect(tmp_path / "store", {}, 0)
        return read(self, item)

    monkeypatch.setattr(Entries, "read", read_beside_a_collector)
    export(Store(tmp_path / "store"), [need_of(entries, image(0), image(19))], "latents", tmp_path / "x")
    assert sorted(safetensors.numpy.load_file(tmp_path / "x")) == ["0.png", "19.png"]
    assert fresh(entries).missing([ITEMS[0], ITEMS[10], ITEMS[19]]) == [ITEMS[10]]


def test_photos_of_several_recipes_are_exported_together(tmp_path):
    wide, high = fill(entries_of(tmp_path / "store", shape=(2, 3))), fill(entries_of(tmp_path / "store", shape=(3, 2)))
    needs = [need_of(wide, image(0)), need_of(high, image(1))]
    export(Store(tmp_path / "store"), needs, "latents", tmp_path / "x.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {name: array.shape for name, array in found.items()} == {"0.png": (2, 3), "1.png": (3, 2)}
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert json.loads(file.metadata()["recipe"]) == [wide.recipe, high.recipe]


def exported(capsys, lab, kind):
    """The tensors of a kind of an experiment, as the command line exports them."""
    path = lab.folder / f"{kind}.safetensors"
    capsys.readouterr()
    code, out, err = run(capsys, "export", lab.path, "--kind", kind, "--out", path)
    assert (code, err) == (0, "") and f"of {kind}" in out
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["kind"] == kind
    return safetensors.numpy.load_file(path)


def test_latents_are_the_photos_and_controls_the_conditions_by_the_same_names(encoded_pairs, tmp_path, capsys):
    lab = encoded_pairs.copy(tmp_path / "lab")
    photos, entries = plan_of(lab).photos, lab.latents  # a condition from a file has the recipe of a photo
    latents, controls = exported(capsys, lab, "latents"), exported(capsys, lab, "controls")
    assert sorted(latents) == sorted(controls) == sorted(photo.name for photo in photos)
    for photo in photos:
        np.testing.assert_array_equal(bits(latents[photo.name]), bits(entries.read(photo.digest)))
        np.testing.assert_array_equal(bits(controls[photo.name]), bits(entries.read(photo.condition.digest)))


def test_computed_conditions_and_those_that_are_sampled_with_are_controls_too(encoded_pairs, tmp_path, capsys):
    lab = encoded_pairs.copy(tmp_path / "lab").set("controlnet", condition="canny")
    photos, names = plan_of(lab).photos, ["pictures/00000.png", "pictures/conditions/00001.png"]
    lab.set("sample", prompts=["a", "b"], conditions=names, resolution=48)  # another size than the training's
    encode(lab)
    latents, controls = exported(capsys, lab, "latents"), exported(capsys, lab, "controls")
    assert sorted(latents) == sorted(photo.name for photo in photos)
    assert sorted(controls) == sorted([*latents, *(f"{name} (for sampling)" for name in names)])
    shapes = {name: controls[name].shape[1:] for name in controls}
    assert shapes == {name: (4, 4) if name in latents else (6, 6) for name in controls}


def test_a_condition_named_for_sampling_as_a_photo_is_called_clashes_with_no_photo(encoded_pairs, tmp_path, capsys):
    lab = encoded_pairs.copy(tmp_path / "lab")
    (lab.folder / "00000.png").write_bytes((lab.pictures / "00001.png").read_bytes())
    lab.set("sample", prompts=["a"], conditions=["00000.png"], resolution=48)
    encode(lab)
    assert {"00000.png", "00000.png (for sampling)"} < set(exported(capsys, lab, "controls"))


def test_a_lora_has_no_controls_to_export(encoded, tmp_path, capsys):
    code, _, err = run(capsys, "export", encoded.path, "--kind", "controls", "--out", tmp_path / "x")
    assert code == 1 and "the experiment has no controls" in err and not (tmp_path / "x").exists()


@pytest.fixture
def exporting(tmp_path, capsys, monkeypatch):
    """Runs the export of some needs; returns its exit code and outputs, and what is then beside the store."""

    def act(*needs, arguments=()):
        monkeypatch.setattr(experiments, "needs_of", lambda experiment: (Store(tmp_path / "store"), needs))
        out = tmp_path / "out" / "x.safetensors"
        result = run(capsys, "export", "my.toml", "--kind", "latents", "--out", out, *arguments)
        return *result, {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    (tmp_path / "out").mkdir()
    return act


def test_missing_entries_are_counted_with_the_command_that_encodes_them(tmp_path, exporting):
    entries = fill(entries_of(tmp_path / "store"), ITEMS[:3])
    code, out, err, files = exporting(need_of(entries, *map(image, range(5))))
    assert (code, out, files) == (1, "", {})
    assert "not written: 2 of 5 entries of latents-" in err and err.count("\n") == 1
    assert "luigi --module tasks EncodeImages --experiment my.toml" in err


def test_an_entry_found_damaged_on_the_way_leaves_no_file(tmp_path, exporting):
    entries = fill(entries_of(tmp_path / "store"))
    damage_row(entries, 4)
    code, out, err, files = exporting(need_of(entries, *map(image, range(9))))
    assert (code, out, files) == (1, "", {}) and f"item {ITEMS[4]} is damaged" in err


def test_a_file_that_is_there_is_replaced_only_on_request(tmp_path, exporting):
    entries = fill(entries_of(tmp_path / "store"))
    (tmp_path / "out" / "x.safetensors").write_bytes(b"precious")
    code, _, err, files = exporting(need_of(entries, image(0)))
    assert (code, files) == (1, {"x.safetensors": b"precious"}) and "--force" in err
    code, out, _, files = exporting(need_of(entries, image(0)), arguments=["--force"])
    assert code == 0 and "1 tensor of latents" in out and list(files) == ["x.safetensors"]
    assert list(safetensors.numpy.load(files["x.safetensors"])) == ["0.png"]


@pytest.mark.parametrize("name", ["__metadata__", "surrogate\udcff.png"])
def test_names_that_the_format_cannot_hold_are_refused(tmp_path, exporting, name):
    entries = fill(entries_of(tmp_path / "store"))
    code, _, err, files = exporting(need_of(entries, image(0, name)))
    assert (code, files) == (1, {}) and "rename it" in err and err.isprintable() is False and "\udcff" not in err


def test_two_tensors_of_one_name_are_refused(tmp_path, exporting):
    entries = fill(entries_of(tmp_path / "store"))
    code, _, err, files = exporting(need_of(entries, image(0, "cat.jpg"), image(1, "cat.jpg")))
    assert (code, files) == (1, {}) and "as another one is" in err


def test_a_header_that_no_reader_accepts_is_refused(tmp_path, exporting, monkeypatch):
    entries = fill(entries_of(tmp_path / "store"))
    monkeypatch.setattr("cache.core.tensors.MAX_HEADER_BYTES", 300)
    code, _, err, files = exporting(need_of(entries, *map(image, range(9))))
    assert (code, files) == (1, {}) and "header" in err


def test_a_kind_that_the_experiment_lacks_is_said(tmp_path, exporting):
    code, _, err, files = exporting(need_of(entries_of(tmp_path / "store", kind="txt"), image(0)))
    assert (code, files) == (1, {}) and "the experiment has no latents" in err


def test_an_export_to_a_folder_that_is_not_there_is_said_in_one_line(tmp_path, capsys):
    entries = fill(entries_of(tmp_path / "store"))
    with pytest.raises(StoreError, match="nowhere/x: not written: No such file or directory; choose another place"):
        export(Store(tmp_path / "store"), [need_of(entries, image(0))], "latents", tmp_path / "nowhere" / "x")
