"""Finding photos and captions in a folder: what is taken, what is refused, and that nothing leads out of it."""

import csv
import os
import sys

import pyarrow
import pytest
from photo_files import captions, link_out, metadata, photo, problems
from pyarrow import parquet

from pipeline.data import formats
from pipeline.data.photos import list_photos
from pipeline.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


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


def test_a_csv_names_photos_and_captions(folder):
    for name in ("a.png", "b.png", "c.png", "edges/a.png"):
        photo(folder, name, None)
    rows = "\ufefffile_name,caption,conditioning_image,other\r\n"
    rows += '"a.png","a cat, ""sleeping""\r\non a sofa",edges/a.png,1\r\n'
    (folder / "metadata.csv").write_bytes((rows + "./b.png,ein Käse,,\r\nc.png\r\n").encode())
    photos, found = list_photos(folder)
    assert {each.name: (each.caption, each.conditioning) for each in photos} == {
        "a.png": ('a cat, "sleeping"\r\non a sofa', "edges/a.png"),
        "b.png": ("ein Käse", None),
    }
    assert [(each.name, each.reason) for each in found] == [
        ("c.png", 'no caption: its line in metadata.csv has no "text"')
    ]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"file_name;text\na.png;a cat\n", "its first line is file_name;text; expected names of columns"),
        (b"", "its first line is nothing"),
        ("file_name,text\na.png,Käse".encode("latin-1"), "not UTF-8"),
        (b"file_name,text\na.png," + b"x" * 200_000, "line 1 is no CSV: field larger than field limit"),
    ],
    ids=["semicolons", "nothing", "not UTF-8", "without end"],
)
def test_a_csv_that_cannot_be_read_is_one_line(folder, content, reason):
    photo(folder, "a.png", None)
    (folder / "metadata.csv").write_bytes(content)
    limit = csv.field_size_limit(131_072)  # Python's default; libraries that are imported by other tests raise it
    try:
        with pytest.raises(UserError, match=f"metadata.csv: {reason}"):
            list_photos(folder)
    finally:
        csv.field_size_limit(limit)


def test_a_parquet_file_names_photos_and_captions(folder):
    for name in ("a.png", "b.png", "c.png"):
        photo(folder, name, None)
    columns = {
        "file_name": ["a.png", "./b.png", "c.png", "../d.png", None],
        "caption": ["a cat", "ein Käse", None, "d", "e"],
    }
    parquet.write_table(pyarrow.table(columns | {"pixels": [b"1"] * 5}), folder / "metadata.parquet")
    photos, found = list_photos(folder)
    assert {each.name: each.caption for each in photos} == {"a.png": "a cat", "b.png": "ein Käse"}
    assert {each.name: each.reason for each in found} == {
        "c.png": 'no caption: its line in metadata.parquet has no "text"',
        "../d.png": "its path leads out of the folder",
        "metadata.parquet, line 5": 'no "file_name"',
    }


@pytest.mark.parametrize(
    "columns, reason", [(None, "cannot be read as Parquet"), ({"image": [1]}, "its columns are image")]
)
def test_a_parquet_file_that_cannot_be_read_is_one_line(folder, columns, reason):
    photo(folder, "a.png", None)
    path = folder / "metadata.parquet"
    parquet.write_table(pyarrow.table(columns), path) if columns else path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=f"metadata.parquet: {reason}"):
        list_photos(folder)


@pytest.mark.parametrize("row", ["../out.png,a", "/etc/hostname,a", "sub/../b.png,a"])
def test_a_csv_leads_nowhere_out_of_the_folder(folder, row):
    photo(folder, "../out.png", None)
    (folder / "metadata.csv").write_text(f"file_name,text\n{row}\n")
    assert list(problems(folder).values()) == ["its path leads out of the folder"]


def test_names_of_other_programs_are_read_after_our_own(folder):
    photo(folder, "a.png", None)
    photo(folder, "b.png", "by txt")
    for name in "ab":
        (folder / f"{name}.caption").write_text("by caption")
    assert captions(folder) == {"a.png": "by caption", "b.png": "by txt"}
    (folder / "metadata.csv").write_text("file_name,text\na.png,by csv\n")
    assert captions(folder) == {"a.png": "by csv"}
    metadata(folder, {"file_name": "a.png", "caption": "by jsonl"}, {"file_name": "b.png", "text": "t", "caption": "c"})
    assert captions(folder) == {"a.png": "by jsonl", "b.png": "t"}


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


@pytest.mark.parametrize("name, package", [("b.HEIC", "heic"), ("b.jxl", "jxl")])
def test_photos_that_take_a_package_which_is_not_here_are_not_passed_over_in_silence(
    folder, monkeypatch, name, package
):
    photo(folder, "a.png")
    (folder / name).write_bytes(b"\0")
    monkeypatch.setattr(formats.Extra, "is_here", False)
    assert f"pip install 'mindspore-flux-finetune[{package}]'" in problems(folder)[name]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such file names")
def test_a_file_name_that_is_not_utf8_is_a_problem(folder):
    with open(os.fsencode(folder) + b"/K\xe4se.png", "wb"):
        pass
    assert problems(folder, "a cat") == {"K\udce4se.png": "its name is not valid UTF-8 text"}


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: None, "no such folder; set .* holds the photos$"),
        (lambda path: path.touch(), "a file, and no folder; set"),
        (lambda path: path.with_name("photo").mkdir(), "no such folder; .*; did you mean photo[?]$"),
    ],
)
def test_a_missing_folder_is_a_user_error(tmp_path, make, said):
    make(tmp_path / "photos")
    with pytest.raises(UserError, match=f"photos: {said}"):
        list_photos(tmp_path / "photos")


def test_a_folder_without_photos_is_a_user_error(folder):
    (folder / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match="photos: no photo in it; expected metadata.jsonl, or images with"):
        list_photos(folder)
