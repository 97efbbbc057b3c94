"""Hooks of the site (mkdocs.yml): files of the repository that pages link to, such as CHANGELOG.md, are part of it."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"(\]\()\.\./([^)#\s]+)")
"""A link from a page in docs/ to a file beside docs/."""


def on_files(files, config):
    pages = [path.read_text(encoding="utf-8") for path in sorted(Path(config.docs_dir).glob("*.md"))]
    linked = {name for text in pages for _, name in OUTSIDE.findall(text)}
    for name in sorted(linked | {"CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"}):
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=(ROOT / name).read_bytes()))
    return files


def on_page_markdown(markdown, page, **_):
    if (ROOT / page.file.src_uri).is_file():  # beside docs/: its links into docs/ are to pages beside it here
        return markdown.replace("](docs/", "](")
    return OUTSIDE.sub(r"\1\2", markdown)
