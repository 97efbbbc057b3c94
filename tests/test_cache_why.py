"""`python -m cache why` and `diff`: why something is missing, and what makes two experiments differ."""

import os

import numpy as np
import safetensors
import safetensors.numpy
from test_cache_store import ITEMS, entries_of, fill, segments
from tools import NASTY, as_json, image, need_of, run, shard, write

from cache import (
    Source,
    Store,
    caption_item,
)
from cache.tools import experiments
from cache.tools.compare import diff, differences, held_in, needed
from cache.tools.explain import why


def reasons_of(answer):
    return {reason.reason: [each.name for each in reason.items] for reason in answer.reasons}


def test_what_is_all_there_is_said_in_one_line_for_each_stage(tmp_path, capsys, monkeypatch):
    latents = fill(entries_of(tmp_path))
    needs = [need_of(latents, image(0), image(1))]
    monkeypatch.setattr(experiments, "needs_of", lambda experiment: (Store(tmp_path), needs))
    code, out, _ = run(capsys, "why", "my.toml")
    assert (code, out) == (0, f"EncodeImages (latents-{latents.id[:12]}): all 2 are there\n")


def test_each_missing_item_has_exactly_one_reason(tmp_path):
    entries = write(entries_of(tmp_path, width=512), *((ITEMS[number], f"{number}.png") for number in range(3)))
    write(entries_of(tmp_path, width=256), (ITEMS[10], "10.png"), (ITEMS[11], "1.png"))
    entries.note_damage(entries.index().segments[0], [0])
    need = need_of(entries, image(0), image(11, "1.png"), image(2), image(10), image(12))
    [answer] = why(Store(tmp_path), [need])
    assert reasons_of(answer) == {"damaged": ["0.png"], "changed": ["1.png"], "recipe": ["10.png"], "new": ["12.png"]}
    assert (answer.wanted, answer.num_missing, answer.present) == (5, 4, {str(tmp_path): 1})
    assert [reason.items[0].text for reason in answer.reasons] == [
        f"0.png, in segment {segments(entries)[0].name}",
        f"1.png changed since it was encoded ({ITEMS[1][:8]} -> {ITEMS[11][:8]})",
        "10.png",
        "12.png",
    ]
    assert [each.text for each in answer.reasons[2].differences] == ["width differs: 256 -> 512"]


def test_a_changed_caption_is_told_from_a_changed_photo(tmp_path):
    old, new = "a cat", NASTY
    entries = write(entries_of(tmp_path, kind="txt"), (caption_item(old), "cat.jpg"))
    need = need_of(entries, Source(caption_item(new), "cat.jpg", new), stage="EncodeT5", component="text_encoder_2")
    [reason] = why(Store(tmp_path), [need])[0].reasons
    assert reason.reason == "changed"
    assert reason.items[0].text.startswith('the caption of cat.jpg changed, now "a "quoted"\\ncat \\x1b[2J')


def test_the_photo_that_was_encoded_last_under_a_name_is_the_one_that_changed(tmp_path):
    entries = write(write(entries_of(tmp_path), (ITEMS[0], "cat.jpg")), (ITEMS[1], "cat.jpg"))
    [reason] = why(Store(tmp_path), [need_of(entries, image(2, "cat.jpg"))])[0].reasons
    assert f"({ITEMS[1][:8]} -> {ITEMS[2][:8]})" in reason.items[0].text


def test_a_photo_is_no_older_content_of_the_condition_that_has_its_recipe_and_name(tmp_path):
    entries = write(entries_of(tmp_path), (ITEMS[0], "cat.jpg"))
    photo, condition = need_of(entries, image(0, "cat.jpg")), need_of(entries, image(1, "cat.jpg"), role="controls")
    assert [reasons_of(answer) for answer in why(Store(tmp_path), [photo, condition])] == [{}, {"new": ["cat.jpg"]}]


def test_a_changed_caption_is_told_where_another_photo_still_has_the_old_one(tmp_path):
    entries = write(entries_of(tmp_path, kind="txt"), (caption_item("a cat"), "cat.jpg"))
    captions = {"cat.jpg": "a black cat", "dog.jpg": "a cat"}
    need = need_of(entries, *(Source(caption_item(text), name, text) for name, text in captions.items()))
    assert reasons_of(why(Store(tmp_path), [need])[0]) == {"changed": ["cat.jpg"]}


def test_other_weights_are_named_by_component_and_digest(tmp_path):
    old = fill(entries_of(tmp_path, encoder={"weights": "3f2a91c0" + "0" * 24, "config": "1" * 32}), ITEMS[:2])
    new = entries_of(tmp_path, encoder={"weights": "91c07be2" + "0" * 24, "config": "1" * 32})
    [reason] = why(Store(tmp_path), [need_of(new, image(0), image(1))])[0].reasons
    assert (reason.reason, reason.nearest, len(reason.items)) == ("recipe", old.path.name, 2)
    assert [each.text for each in reason.differences] == ["vae weights differ: 3f2a91c0 -> 91c07be2"]


def test_of_several_recipes_the_one_with_fewest_differences_explains(tmp_path):
    fill(entries_of(tmp_path, a=1, b=1, c=1))
    near = fill(entries_of(tmp_path, a=0, b=0, c=1))
    fill(entries_of(tmp_path, kind="txt", a=0, b=0, c=0))
    [reason] = why(Store(tmp_path), [need_of(entries_of(tmp_path, a=0, b=0, c=0), image(3))])[0].reasons
    assert reason.nearest == near.path.name


def test_of_recipes_as_near_the_one_that_holds_most_explains_and_the_next_the_rest(tmp_path):
    few = fill(entries_of(tmp_path, a=1), [ITEMS[0], ITEMS[9]])
    most = fill(entries_of(tmp_path, a=2), ITEMS[:3])
    wanted = need_of(entries_of(tmp_path, a=0), *map(image, (0, 1, 2, 9)))
    found = why(Store(tmp_path), [wanted])[0].reasons
    assert [(reason.nearest, len(reason.items)) for reason in found] == [(most.path.name, 3), (few.path.name, 1)]


def test_a_recipe_that_holds_what_is_wanted_goes_before_a_nearer_one_that_does_not(tmp_path):
    fill(entries_of(tmp_path, a=1, b=0), [ITEMS[19]])
    holder = fill(entries_of(tmp_path, a=1, b=1), [ITEMS[0]])
    [reason] = why(Store(tmp_path), [need_of(entries_of(tmp_path, a=0, b=0), image(0))])[0].reasons
    assert reason.nearest == holder.path.name


def test_with_nothing_of_a_recipe_the_nearest_is_named_even_where_all_is_new(tmp_path):
    fill(entries_of(tmp_path, width=512), [ITEMS[19]])
    first, second = why(Store(tmp_path), [need_of(entries_of(tmp_path, width=768), image(0))])[0].reasons
    assert (first.reason, first.items) == ("recipe", [])
    assert [each.text for each in first.differences] == ["width differs: 512 -> 768"]
    assert (second.reason, len(second.items)) == ("new", 1)


def test_with_a_recipe_in_use_a_new_photo_is_just_new(tmp_path):
    fill(entries_of(tmp_path, width=512), [ITEMS[19]])
    used = fill(entries_of(tmp_path, width=768), [ITEMS[1]])
    assert [reason.reason for reason in why(Store(tmp_path), [need_of(used, image(0))])[0].reasons] == ["new"]


def test_in_a_store_that_is_not_there_yet_all_is_new(tmp_path):
    [answer] = why(Store(tmp_path / "store"), [need_of(entries_of(tmp_path / "store"), image(0))])
    assert reasons_of(answer) == {"new": ["0.png"]} and not (tmp_path / "store").exists()


def test_what_a_truncated_segment_held_is_damaged_and_can_be_saved(tmp_path):
    entries = fill(entries_of(tmp_path), ITEMS[:3])
    os.truncate(shard(segments(entries)[0]), 30)
    [reason] = why(Store(tmp_path), [need_of(entries, image(0))])[0].reasons
    assert reason.reason == "damaged" and "verify --repair" in reason.items[0].text


def test_with_several_stores_it_is_said_how_many_come_from_each(tmp_path, capsys, monkeypatch):
    ours, theirs = fill(entries_of(tmp_path / "a"), ITEMS[:3]), fill(entries_of(tmp_path / "b"), ITEMS[2:7])
    store, need = Store(tmp_path / "a", tmp_path / "b"), need_of(ours, *map(image, range(9)))
    [answer] = why(store, [need])
    assert answer.present == {str(tmp_path / "a"): 3, str(tmp_path / "b"): 4} and answer.num_missing == 2
    monkeypatch.setattr(experiments, "needs_of", lambda experiment: (store, [need]))
    line = run(capsys, "why")[1].splitlines()[0]
    assert line.endswith(f"7 of 9 are there (3 from {tmp_path}/a, 4 from {tmp_path}/b), 2 missing")
    assert theirs.path.exists()


def test_ten_examples_are_shown_and_all_on_request(tmp_path, capsys, monkeypatch):
    need = need_of(entries_of(tmp_path), *map(image, range(12)))
    monkeypatch.setattr(experiments, "needs_of", lambda experiment: (Store(tmp_path), [need]))
    lines = run(capsys, "why")[1].splitlines()
    assert lines[1:3] == ["  12 new:", "    0.png"] and lines[-1] == "    and 2 more (--all names them)"
    assert len(lines) == 13 and len(run(capsys, "why", "--all")[1].splitlines()) == 14
    assert len(as_json(capsys, "why")[1][0]["reasons"][0]["items"]) == 12


def test_recipes_differ_by_field_whatever_is_nested_or_absent():
    old = {"encoder": {"weights": "a" * 32, "config": "c" * 32}, "width": 512, "crop": "centre", "shape": [1, 2]}
    new = {"encoder": {"weights": "b" * 32, "config": "c" * 32}, "width": 768, "flip": False, "shape": [1, 3]}
    assert [(each.field, each.text) for each in differences(old, new)] == [
        ("crop", "crop differs: centre -> nothing"),
        ("encoder.weights", f"encoder weights differ: {'a' * 8} -> {'b' * 8}"),
        ("flip", "flip differs: nothing -> false"),
        ("shape", "shape differs: [1, 2] -> [1, 3]"),
        ("width", "width differs: 512 -> 768"),
    ]
    assert differences(old, old) == []


def test_diff_counts_items_by_kind(tmp_path):
    a, b = entries_of(tmp_path, width=1), entries_of(tmp_path, width=2)
    pooled = entries_of(tmp_path, kind="pooled")
    ours, theirs = [need_of(a, *map(image, range(5)))], [need_of(b, *map(image, range(3, 9))), need_of(pooled)]
    pairs = diff(needed(ours), needed(theirs))
    assert [(pair.kind, pair.ids) for pair in pairs] == [("latents", (a.id, b.id)), ("pooled", (None, pooled.id))]
    assert [len(names) for names in (pairs[0].only_in_a, pairs[0].only_in_b, pairs[0].in_both)] == [3, 4, 2]
    assert [each.text for each in pairs[0].differences] == ["width differs: 1 -> 2"]


def test_diff_sets_each_recipe_against_the_one_most_like_it(tmp_path):
    one, two, three = (entries_of(tmp_path, a=a, b=b) for a, b in ((0, 0), (1, 1), (1, 2)))
    pairs = diff(needed([need_of(one), need_of(two)]), needed([need_of(three), need_of(one)]))
    assert [pair.ids for pair in pairs] == [(one.id, one.id), (two.id, three.id)]


def test_diff_of_two_folders_compares_what_they_hold(tmp_path, capsys, monkeypatch):
    a, b = fill(entries_of(tmp_path / "a", note=1), ITEMS[:5]), fill(entries_of(tmp_path / "b", note=2), ITEMS[3:9])
    a.note_damage(a.index().segments[0], [4])
    monkeypatch.chdir(tmp_path / "a" / "entries")
    code, out, err = run(capsys, "diff", a.path.name, b.path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"latents: other recipes ({a.id[:12]} -> {b.id[:12]})",
        "  note differs: 1 -> 2",
        "  1 item in both, 3 only in A, 5 only in B",
    ]
    assert list(as_json(capsys, "diff", a.path, b.path)[1][0]["only_in_a"]) == ITEMS[:3]
    assert len(held_in(a)[0].names) == 4


def test_a_folder_that_holds_no_entries_cannot_be_compared(tmp_path, capsys):
    code, out, err = run(capsys, "diff", tmp_path, tmp_path)
    assert (code, out) == (1, "") and err.startswith(f"error: {tmp_path}/recipe.json: cannot be read: No such file")


def test_of_an_experiment_that_is_encoded_everything_is_there_and_exported(encoded, tmp_path, capsys):
    code, out, _ = run(capsys, "why", encoded.path)
    assert code == 0 and [line.partition(":")[2] for line in out.splitlines()] == [" all 3 are there"] * 3
    assert run(capsys, "export", encoded.path, "--kind", "prompts", "--out", tmp_path / "x")[0] == 0
    found = safetensors.numpy.load_file(tmp_path / "x")
    assert sorted(found) == sorted(row["text"] for row in encoded.captions())
    for caption, array in found.items():
        np.testing.assert_array_equal(array, encoded.plan.txt.read(caption_item(caption)))


def test_what_was_changed_in_an_experiment_is_what_why_and_diff_say(encoded, tmp_path, capsys):
    lab = encoded.copy(tmp_path / "lab").set("data", resolution=48)
    captions = lab.captions()
    lab.write_captions([captions[0] | {"text": "another caption"}, *captions[1:]])
    lab.settle()
    capsys.readouterr()
    clip, t5, images = as_json(capsys, "why", lab.path)[1]
    assert (clip["missing"], t5["missing"], images["missing"]) == (1, 1, 3)
    assert [reason["reason"] for reason in clip["reasons"]] == ["changed"]
    texts = {each["field"]: each["text"] for each in images["reasons"][0]["differences"]}
    assert texts.keys() == {"width", "height", "shape"} and texts["width"] == "width differs: 32 -> 48"

    pairs = {pair["kind"]: pair for pair in as_json(capsys, "diff", encoded.path, lab.path)[1]}
    assert {pair["field"] for pair in pairs["latents"]["differences"]} == texts.keys()
    assert (len(pairs["latents"]["in_both"]), len(pairs["txt"]["only_in_b"]), pairs["txt"]["differences"]) == (3, 1, [])
    code, _, err = run(capsys, "export", lab.path, "--kind", "latents", "--out", tmp_path / "x")
    assert code == 1 and f"EncodeImages --experiment {lab.path}" in err
