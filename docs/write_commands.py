"""Write docs/commands.md from the parsers' own help: ``python docs/write_commands.py``."""

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

HEADING = """# Commands

This page is written by `python docs/write_commands.py` from what `--help` says.

| command | what for |
|---|---|
| `luigi --module tasks TASK --experiment FILE` | an experiment, all stages that it needs: the command of every day |
| [`python -m pipeline`](#pipeline) | one stage, and tools around an experiment |
| [`python -m cache`](#cache) | the store |
| [`python -m tasks`](#tasks) | the list of tasks; several workers |
| `make` | lists its targets: setup, demos, tests, this site |

Exit codes: 0 for success, 1 with one line on stderr for an error, 2 for a wrong option, 30 where a stage failed under
Luigi, 130 after Ctrl-C. Relative paths are relative to where you are; those inside an experiment file, to the file.

## Luigi's tasks {TASKS}
"""


def as_markdown() -> str:
    from cache.__main__ import main as cache
    from pipeline import stage_table
    from pipeline.commands import main as pipeline
    from tasks.__main__ import main as tasks

    listed = (
        "\nA task runs what it needs first, and nothing that is there already. Without `--experiment` the embedded "
        "default is run.\nA stage alone, without Luigi: `python -m pipeline run EncodeT5 --experiment my.toml`.\n\n"
        f"```\n{stage_table.described(with_groups=True)}\n```\n"
    )
    parts = [HEADING.replace(" {TASKS}", ""), listed]
    for name, main in (("pipeline", pipeline), ("cache", cache), ("tasks", tasks)):
        overview = _help(main)
        parts += [f"\n## {name}\n\n```\n{overview}```\n"]
        for command in re.findall(r"^    ([a-z][a-z-]+)\b", overview, re.M):
            parts += [f"\n### {name} {command}\n\n```\n{_help(main, command)}```\n"]
    return "".join(parts)


def _help(main: Callable[[list[str]], int], *command: str) -> str:
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return said.getvalue()


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(as_markdown(), encoding="utf-8")
