import json
import os
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cache import FileFacts, digest
from pipeline.data import indexing
from pipeline.data.indexing import index_photos, inspect, read_photo, remembered
from pipeline.data.photos import Problem, list_photos
from pipeline.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.fixture
def facts(tmp_path):
    return FileFacts(tmp_path / "facts.sqlite")


@pytest.fixture
def decoded(monkeypatch):
    """The number of files decoded so far, as a list that grows; the decoding itself is the real one."""
    calls, read = [], indexing.read_image
    monkeypatch.setattr(indexing, "read_image", lambda content: (calls.append(1), read(content))[1])
    return calls


def age(path, seconds=3600):
    """Make a file look as if it was written some time ago, as photos mostly were."""
    os.utime(path, (time.time() - seconds,) * 2)


def photo(folder, name, caption="a cat", size=(8, 6)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    age(path)
    return path


def metadata(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def captions(folder, prompt=""):
    photos, problems = list_photos(folder, prompt)
    assert problems == []
    return {found.name: found.caption for found in photos}


def problems(folder, prompt=""):
    return {problem.name: problem.reason for problem in list_photos(folder, prompt)[1]}


def test_caption_files_are_read_from_beside_the_images(folder):
    photo(folder, "b.jpg", "a cat\n")
    photo(folder, "sub/deep/a.PNG", "  ein Käse 🧀 \r\n")
    photo(folder, "a.b.png", "two dots")
    assert captions(folder) == {"a.b.png": "two dots", "b.jpg": "a cat", "sub/deep/a.PNG": "ein Käse 🧀"}


def test_a_byte_order_mark_is_no_part_of_a_caption(folder):
    photo(folder, "a.png").with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa cat")
    assert captions(folder) == {"a.png": "a cat"}


def test_photos_come_sorted_by_name(folder):
    for name in ("c.png", "B.png", "a/z.png", "a.png"):
        photo(folder, name)
    assert list(captions(folder)) == ["B.png", "a.png", "a/z.png", "c.png"]


def test_one_prompt_is_the_caption_of_all_and_needs_no_files(folder):
    photo(folder, "a.png", None)
    photo(folder, "b.png", "another caption")
    assert captions(folder, " a photo of sks dog ") == {name: "a photo of sks dog" for name in ("a.png", "b.png")}


def test_a_blank_prompt_is_no_prompt(folder):
    photo(folder, "a.png", "a cat")
    assert captions(folder, "  ") == {"a.png": "a cat"}


def test_hidden_files_are_passed_over(folder):
    photo(folder, "a.png")
    for name in ("._a.png", ".hidden.jpg", ".cache/b.png", "Thumbs.db", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0")
    assert captions(folder) == {"a.png": "a cat"}


def test_metadata_names_photos_and_captions(folder):
    photo(folder, "train/b.png", None)
    photo(folder, "a.png", None)
    photo(folder, "not-listed.png", None)
    listed = {"file_name": "train/b.png", "text": " ein Käse ", "other": 1}
    metadata(folder, listed, "", {"file_name": "./a.png", "text": "a"})
    assert captions(folder) == {"a.png": "a", "train/b.png": "ein Käse"}


def test_metadata_may_start_with_a_byte_order_mark_and_end_lines_as_windows_does(folder):
    photo(folder, "a.png", None)
    (folder / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.png", "text": "a cat"}\r\n\r\n')
    assert captions(folder) == {"a.png": "a cat"}


def test_metadata_needs_no_text_where_one_prompt_is_for_all(folder):
    photo(folder, "a.png", None)
    metadata(folder, {"file_name": "a.png"})
    assert captions(folder, "a dog") == {"a.png": "a dog"}


def test_conditioning_images_are_kept(folder):
    for name in ("a.png", "b.png", "edges/a.png"):
        photo(folder, name, None)
    with_edges = {"file_name": "a.png", "text": "a", "conditioning_image": "./edges/a.png"}
    metadata(folder, with_edges, {"file_name": "b.png", "text": "b"})
    photos, found = list_photos(folder)
    assert found == []
    assert [each.conditioning for each in photos] == ["edges/a.png", None]


@pytest.mark.parametrize(
    "caption, reason",
    [
        (b"", "its caption a.txt: empty"),
        (b" \n\t", "its caption a.txt: empty"),
        (b"\xff\xfea\0", "its caption a.txt: not UTF-8"),
        ("Käse".encode("latin-1"), "its caption a.txt: not UTF-8"),
        (None, "no caption: a.txt is missing"),
    ],
)
def test_a_bad_caption_file_is_a_problem(folder, caption, reason):
    photo(folder, "a.png", None)
    if caption is not None:
        (folder / "a.txt").write_bytes(caption)
    assert problems(folder) == {"a.png": reason}


B = {"file_name": "b.png", "text": "b"}


@pytest.mark.parametrize(
    "row, name, reason",
    [
        ("{not json", "metadata.jsonl, line 2", "not JSON: "),
        ("[" * 100_000, "metadata.jsonl, line 2", "not JSON: "),
        ("[1]", "metadata.jsonl, line 2", "not a JSON object"),
        ({"text": "a"}, "metadata.jsonl, line 2", 'no "file_name"'),
        ({"file_name": 5, "text": "a"}, "metadata.jsonl, line 2", 'no "file_name"'),
        ({"file_name": "b.png"}, "b.png", 'no caption: its line in metadata.jsonl has no "text"'),
        ({"file_name": "b.png", "text": ""}, "b.png", "its caption in metadata.jsonl: empty"),
        ({"file_name": "b.png", "text": ["a"]}, "b.png", "its caption in metadata.jsonl: not a string"),
        ('{"file_name": "b.png", "text": "\\ud83d"}', "b.png", "its caption in metadata.jsonl: half of a surrogate"),
        ({"file_name": "./a.png", "text": "a"}, "a.png", "listed twice in metadata.jsonl, lines 1 and 2"),
        ({"file_name": "c.png", "text": "a"}, "c.png", "no such file"),
        ({"file_name": "sub", "text": "a"}, "sub", "not a regular file"),
        ({"file_name": "a\0.png", "text": "a"}, "a\0.png", "its name is not valid UTF-8 text"),
        ({"file_name": "x" * 300, "text": "a"}, "x" * 300, "cannot be read: File name too long"),
        ({"file_name": "../out.png", "text": "a"}, "../out.png", "its path leads out of the folder"),
        ({"file_name": "sub/../b.png", "text": "a"}, "sub/../b.png", "its path leads out of the folder"),
        ({"file_name": "/etc/hostname", "text": "a"}, "/etc/hostname", "its path leads out of the folder"),
        ({**B, "conditioning_image": 5}, "b.png", "its conditioning_image 5: not a string"),
        ({**B, "conditioning_image": "c.png"}, "b.png", "its conditioning_image c.png: no such"),
        ({**B, "conditioning_image": "../out.png"}, "b.png", "its conditioning_image ../out.png: its path leads out"),
    ],
)  # fmt: skip
def test_a_bad_line_of_metadata_is_a_problem(folder, row, name, reason):
    for good in ("a.png", "b.png", "sub/c.png", "../out.png"):
        photo(folder, good, None)
    metadata(folder, {"file_name": "a.png", "text": "a"}, row)
    photos, found = list_photos(folder)
    assert [each.name for each in photos] == ["a.png"]
    assert [each.name for each in found] == [name]
    assert found[0].reason.startswith(reason)


def test_a_line_of_metadata_that_is_not_utf8_is_a_problem(folder):
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "K\xe4se"}\n')
    assert problems(folder) == {"metadata.jsonl, line 1": "not UTF-8"}


def link_out(folder, name):
    outside = photo(folder.parent, "outside.png", "private")
    (folder / name).symlink_to(outside)


def test_symlink_out_of_the_folder_is_refused(folder):
    link_out(folder, "a.png")
    assert problems(folder, "a cat") == {"a.png": "a link that leads out of the folder"}


def test_symlink_out_of_the_folder_is_refused_from_metadata(folder):
    link_out(folder, "a.png")
    (folder / "sub").symlink_to(folder.parent)
    metadata(folder, {"file_name": "a.png", "text": "a"}, {"file_name": "sub/outside.png", "text": "a"})
    assert problems(folder) == dict.fromkeys(["a.png", "sub/outside.png"], "a link that leads out of the folder")


def test_a_caption_is_not_read_through_a_symlink_out_of_the_folder(folder):
    photo(folder, "a.png", None)
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "a.txt").symlink_to(folder.parent / "secret.txt")
    assert problems(folder) == {"a.png": "its caption a.txt: a link that leads out of the folder"}


def test_metadata_is_not_read_through_a_symlink_out_of_the_folder(folder):
    (folder.parent / "other.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    (folder / "metadata.jsonl").symlink_to(folder.parent / "other.jsonl")
    with pytest.raises(UserError, match="metadata.jsonl: a link that leads out of the folder"):
        list_photos(folder)


def test_a_folder_with_a_name_that_begins_alike_is_outside(folder):
    outside = photo(folder.parent / "photos-private", "a.png")
    (folder / "a.png").symlink_to(outside)
    assert problems(folder, "a cat") == {"a.png": "a link that leads out of the folder"}


def test_symlinks_within_the_folder_and_to_the_folder_are_followed(folder):
    photo(folder, "sub/a.png", None)
    (folder / "b.png").symlink_to("sub/a.png")
    (folder.parent / "alias").symlink_to(folder)
    assert set(captions(folder.parent / "alias", "a cat")) == {"b.png", "sub/a.png"}


def test_a_linked_folder_is_said_not_to_be_followed(folder):
    photo(folder, "a.png")
    (folder / "more").symlink_to(folder.parent)
    assert problems(folder) == {"more": "a link to a folder, which is not followed"}


def test_a_dangling_link_a_loop_and_a_pipe_are_problems(folder):
    (folder / "a.png").symlink_to("nowhere.png")
    (folder / "b.png").symlink_to("b.png")
    os.mkfifo(folder / "c.png")
    found = problems(folder, "a cat")
    assert found.pop("b.png").startswith("cannot be read: Too many levels")
    assert found == {"a.png": "no such file", "c.png": "not a regular file"}


def test_photos_of_kinds_that_are_not_read_are_not_passed_over_in_silence(folder):
    photo(folder, "a.png")
    (folder / "b.HEIC").write_bytes(b"\0")
    assert problems(folder) == {"b.HEIC": "HEIC is not read; convert it to JPEG or PNG"}


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such file names")
def test_a_file_name_that_is_not_utf8_is_a_problem(folder):
    with open(os.fsencode(folder) + b"/K\xe4se.png", "wb"):
        pass
    assert problems(folder, "a cat") == {"K\udce4se.png": "its name is not valid UTF-8 text"}


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch()])
def test_a_missing_folder_is_a_user_error(tmp_path, make):
    make(tmp_path / "photos")
    with pytest.raises(UserError, match="photos: no such folder; set"):
        list_photos(tmp_path / "photos")


def test_a_folder_without_photos_is_a_user_error(folder):
    (folder / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match="photos: no photo in it; expected metadata.jsonl, or images with"):
        list_photos(folder)


def test_listing_decodes_nothing(folder, decoded):
    (folder / "a.png").write_bytes(b"not an image")
    assert captions(folder, "a cat") == {"a.png": "a cat"}
    assert decoded == []


def test_index_gives_digest_and_upright_size(folder, facts):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(folder / "a.jpg", exif=exif)
    age(folder / "a.jpg")
    photo(folder, "b.png", "a dog", (5, 4))
    one, two = index_photos(folder, "a cat", facts)
    assert (one.name, one.path, one.caption, one.width, one.height) == ("a.jpg", folder / "a.jpg", "a cat", 6, 8)
    assert (two.width, two.height, two.digest) == (5, 4, digest((folder / "b.png").read_bytes()))


def test_second_index_decodes_nothing_and_is_the_same(folder, facts, decoded):
    for name in ("a.png", "b.jpg", "sub/c.webp"):
        photo(folder, name)
    first = index_photos(folder, "", facts)
    assert len(decoded) == 3
    assert index_photos(folder, "", FileFacts(facts.path)) == first
    assert len(decoded) == 3


def test_only_a_new_or_changed_photo_is_decoded(folder, facts, decoded):
    for name in ("a.png", "b.png"):
        photo(folder, name)
    before = index_photos(folder, "", facts)
    photo(folder, "b.png", size=(9, 9))
    photo(folder, "c.png")
    after = index_photos(folder, "", facts)
    assert len(decoded) == 2 + 2
    assert after[0] == before[0] and after[1].digest != before[1].digest and after[1].width == 9


def test_an_edited_caption_decodes_nothing(folder, facts, decoded):
    photo(folder, "a.png", "a cat")
    before = index_photos(folder, "", facts)[0]
    (folder / "a.txt").write_text("a dog")
    after = index_photos(folder, "", facts)[0]
    assert (after.caption, after.digest, len(decoded)) == ("a dog", before.digest, 1)


def test_inspected_says_whether_anything_is_left_to_decode(folder, facts, decoded):
    photo(folder, "a.png")
    photos, _ = list_photos(folder)
    assert remembered(photos, facts) is None
    inspect(photos, facts)
    assert remembered(photos, facts) is not None
    photo(folder, "b.png")
    assert remembered(list_photos(folder)[0], facts) is None
    assert len(decoded) == 1


def test_a_photo_written_just_now_is_remembered_as_well(folder, facts):
    age(photo(folder, "a.png"), seconds=2.5)
    photos, _ = list_photos(folder)
    inspect(photos, facts)
    assert remembered(photos, facts) is not None


def test_a_file_that_was_only_digested_still_has_to_decode(folder, facts):
    (folder / "a.png").write_bytes(b"not an image")
    age(folder / "a.png")
    facts.file_digest(folder / "a.png")
    photos, _ = list_photos(folder, "a cat")
    assert remembered(photos, facts) is None
    assert inspect(photos, facts)[1] == [Problem("a.png", "not an image (PNG, JPEG, WEBP, BMP, TIFF or GIF)")]


def test_failures_are_never_remembered(folder, facts):
    content = photo(folder, "a.png").read_bytes()
    (folder / "a.png").write_bytes(content[:60])
    age(folder / "a.png")
    photos, _ = list_photos(folder)
    for _ in range(2):
        assert [problem.name for problem in inspect(photos, facts)[1]] == ["a.png"]
        assert remembered(photos, facts) is None


def test_progress_counts_what_is_decoded(folder, facts, monkeypatch):
    monkeypatch.setattr(indexing, "BATCH", 2)
    for name in "abcde":
        photo(folder, f"{name}.png")
    index_photos(folder, "", facts)
    for name in "cdexy":
        photo(folder, f"{name}.png", size=(7, 7))
    seen = []
    index_photos(folder, "", facts, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_an_interrupted_inspection_keeps_the_batches_before(folder, facts, monkeypatch, decoded):
    monkeypatch.setattr(indexing, "BATCH", 2)
    for name in "abcde":
        photo(folder, f"{name}.png")

    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_photos(folder, "", facts, interrupt)
    decoded.clear()
    assert len(index_photos(folder, "", facts)) == 5
    assert len(decoded) == 3


def test_every_bad_file_is_listed_by_name_and_reason(folder, facts):
    photo(folder, "good.png")
    content = photo(folder, "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(content[:70])
    for name, bad in (("empty.jpg", b""), ("text.jpg", b"hello"), ("captionless.png", content)):
        (folder / name).write_bytes(bad)
    for name in ("empty", "text"):
        (folder / f"{name}.txt").write_text("a cat")
    link_out(folder, "link.png")
    for path in folder.iterdir():
        age(path)
    with pytest.raises(UserError) as error:
        index_photos(folder, "", facts)
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"{folder}: 5 problems; repair or remove")
    assert lines == [
        f"  {folder}/captionless.png: no caption: captionless.txt is missing",
        f"  {folder}/empty.jpg: empty file (0 bytes)",
        f"  {folder}/link.png: a link that leads out of the folder",
        f"  {folder}/text.jpg: not an image (PNG, JPEG, WEBP, BMP, TIFF or GIF)",
        f"  {folder}/truncated.png: truncated: image file is truncated",
    ]


def test_the_report_speaks_of_metadata_only_where_there_is_one(folder, facts):
    (folder / "a.png").write_bytes(b"")
    (folder / "a.txt").write_text("a cat")
    with pytest.raises(UserError) as error:
        index_photos(folder, "", facts)
    assert "metadata.jsonl" not in str(error.value)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}\n')
    with pytest.raises(UserError, match="and its line in metadata.jsonl"):
        index_photos(folder, "", facts)


def test_a_very_long_list_says_how_many_more(folder, facts, monkeypatch):
    monkeypatch.setattr(indexing, "MAX_LISTED", 2)
    for name in "abcde":
        photo(folder, f"{name}.png", None)
    with pytest.raises(UserError) as error:
        index_photos(folder, "", facts)
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and "5 problems" in lines[0]
    assert lines[-1] == "  and 3 more, listed once these are repaired"


def test_a_file_name_cannot_garble_the_terminal(folder, facts):
    (folder / "a\x1b[31m\n\u202egnp.png").touch()
    with pytest.raises(UserError) as error:
        index_photos(folder, "", facts)
    assert "a\\x1b[31m\\n\\u202egnp.png: no caption" in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_an_indexed_photo_is_read_as_it_was_indexed(folder, facts):
    path = photo(folder, "a.png")
    indexed = index_photos(folder, "", facts)[0]
    assert np.array_equal(read_photo(indexed), Image.open(path))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "changed since the photos were indexed"),
        (lambda path: path.unlink(), "No such file or directory; put it back"),
    ],
)
def test_a_photo_that_changed_after_indexing_is_refused(folder, facts, change, reason):
    path = photo(folder, "a.png")
    indexed = index_photos(folder, "", facts)[0]
    change(path)
    with pytest.raises(UserError, match=f"a.png: {reason}"):
        read_photo(indexed)
