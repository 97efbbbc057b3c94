"""README and docs/: their links lead somewhere, their blocks are right, their commands can be typed."""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from benchmarks.__main__ import parser as benchmarks_parser
from cache.tools.arguments import build_parser
from pipeline import commands, stage_table
from pipeline.settings.reading import load_experiment
from tasks.__main__ import _parser as tasks_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
TUTORIALS = ("first-lora.md", "first-controlnet.md")


def blocks(page: Path, language: str) -> list[str]:
    return [text for _, found, text in FENCE.findall(page.read_text()) if found == language]


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub and MkDocs both make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def links(page: Path) -> Iterator[str]:
    for found in LINK.findall(FENCE.sub("", page.read_text())):
        link = found[0] or found[1]
        if not link.startswith(("http://", "https://", "mailto:")):
            yield unquote(link)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    lost = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or anchor and anchor not in anchors(target):
            lost.append(link)
    assert lost == []


def test_every_page_is_in_the_sites_menu():
    menu = set(re.findall(r"^  .*?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {page.name for page in PAGES} | {"CHANGELOG.md"}
    assert menu == pages - {"README.md"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_page_about_commands_is_up_to_date():
    spec = importlib.util.spec_from_file_location("write_commands", ROOT / "docs/write_commands.py")
    write_commands = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_commands)
    assert (ROOT / "docs/commands.md").read_text() == write_commands.as_markdown(), "run: python docs/write_commands.py"


TOML = [(page, text) for page in PAGES for text in blocks(page, "toml")]


@pytest.mark.parametrize("page, text", TOML, ids=[page.name for page, _ in TOML])
def test_every_toml_block_is_an_experiment(tmp_path, page, text):
    path = tmp_path / "my.toml"
    path.write_text(text)
    assert load_experiment(path).folder == tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_compiles(page):
    assert all(compile(text, page.name, "exec") for text in blocks(page, "python"))


# --- commands -----------------------------------------------------------------------------------------------------

OF_LUIGI = {"--module", "--experiment", "--help", "--workers", "--scheduler-url"}
NAMES = {
    "KIND": "prompts",
    "STAGE": "EncodeT5",
    "TASK": "TrainLoRA",
    "$stage": "EncodeCLIP",
    "$SLURM_ARRAY_TASK_ID/8": "0/8",
}
OURS = re.compile(r"(python -m (?:pipeline|cache|tasks|benchmarks)|luigi --module|make(?= [a-z-]+(?: |$)))(.*)")


def typed(page: Path) -> Iterator[list[str]]:
    """What the page tells to type of ours, in blocks and in the text, as words; comments and redirections left out."""
    text = page.read_text().replace("\\\n", " ")
    lines = [
        line for _, kind, block in FENCE.findall(text) if kind in ("", "sh", "bash") for line in block.splitlines()
    ]
    lines = [
        line for line in lines if re.match(r"\s*(\$ |\w+=\S+ |\w+=\$\(|sbatch |python |luigi |make |msrun )", line)
    ]
    for line in [*lines, *re.findall(r"`((?:python -m|luigi|make) [^`\n]+)`", FENCE.sub("", text))]:
        if command := OURS.search(line):
            said = re.split(r"\s(?:>|\||&&|#|\()|[\";[]", command[0])[0]
            yield [NAMES.get(word, word) for word in shlex.split(said) if word != "..."]


def refusal(words: list[str]) -> str:
    """Why a command cannot be typed; empty where it can.  Nothing is run."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            match words:
                case ["python", "-m", "pipeline"] | ["python", "-m", "cache"]:
                    return ""
                case ["python", "-m", "tasks"]:
                    return ""
                case ["python", "-m", "pipeline", *rest]:
                    commands._parser().parse_args(rest)
                case ["python", "-m", "cache", *rest]:
                    build_parser().parse_args(rest)
                case ["python", "-m", "tasks", *rest]:
                    tasks_parser().parse_args(rest)
                case ["python", "-m", "benchmarks", *rest]:
                    benchmarks_parser().parse_args(rest)
                case ["python", "-m", module, *_]:
                    return "" if (ROOT / module.replace(".", "/")).with_suffix(".py").is_file() else "no such module"
                case ["luigi", "--module", "tasks", task, *options]:
                    unknown = {option for option in options if option.startswith("--")} - OF_LUIGI
                    known = {*stage_table.STAGES, *stage_table.GROUPS, "--help"}
                    return "" if task in known and not unknown else f"unknown: {task} {unknown}"
                case ["make", target, *_]:
                    return "" if re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) else "no such target"
                case _:
                    return "not looked at"
    except SystemExit as ended:
        is_a_name = re.search("arguments are required|expected one argument", said.getvalue())  # in the midst of a text
        return said.getvalue() if ended.code and not is_a_name else ""
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_could_be_typed(page):
    refused = {" ".join(words): refusal(words) for words in typed(page)}
    assert {command: why for command, why in refused.items() if why} == {}


def test_commands_are_found_and_wrong_ones_refused():
    assert sum(len(list(typed(page))) for page in PAGES) > 60
    assert refusal(["python", "-m", "pipeline", "plan", "--modelconfig", "x"])
    assert refusal(["luigi", "--module", "tasks", "TrainLora"]) and refusal(["make", "demos"])


@pytest.mark.parametrize("command", [["plan"], ["runs"], ["schema", "--markdown"], ["schema"]])
def test_quick_commands_run(plainly_trained, command, capsys):
    arguments = command if "schema" in command else [*command, str(plainly_trained.path)]
    assert commands.main(arguments) == 0 and capsys.readouterr().out


# --- tutorials ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tutorials_can_be_followed_to_the_pictures(tmp_path):
    """All that both pages tell to type, in their order, by processes, in a folder of a new user's own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    for page in TUTORIALS:
        text = (ROOT / "docs" / page).read_text().partition("## With the real model")[0]
        for name, block in re.findall(r"`(\w+\.toml)`[^`]*?```toml\n(.*?)```", text, re.S):
            (tmp_path / name).write_text(block)
        for line in re.findall(r"^((?:python|luigi) .*)$", text, re.M):
            words = shlex.split(line.replace("examples/", f"{ROOT}/examples/"))
            done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600)
            assert done.returncode == 0, f"{page}: {line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert len(list(tmp_path.glob("runs/cat-*/samples.png"))) == 1
    assert len(list(tmp_path.glob("runs/outline-*/samples.png"))) == 1
