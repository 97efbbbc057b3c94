"""Decoding photos once: what is remembered, what is decoded again, and how faults are told."""

import numpy as np
import pytest
from photo_files import age, captions, link_out, photo
from PIL import Image

from cache import FileFacts, digest
from pipeline.data import indexing
from pipeline.data.images import NOT_AN_IMAGE
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
    calls, examine = [], indexing.examine
    monkeypatch.setattr(indexing, "examine", lambda content: (calls.append(1), examine(content))[1])
    return calls


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
    assert inspect(photos, facts)[1] == [Problem("a.png", NOT_AN_IMAGE)]


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
        f"  {folder}/text.jpg: not an image (PNG, JPEG, WEBP, AVIF, HEIC, JPEG XL, BMP, TIFF or GIF)",
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
