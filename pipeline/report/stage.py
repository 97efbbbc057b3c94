"""The stage that leaves a run's report in its folder.  Imports no MindSpore."""

import re
from pathlib import Path

from cache.terminal.places import shown
from pipeline.page.page import save
from pipeline.plan.plan import Plan
from pipeline.process.progress import say
from pipeline.report import page

HEAD_BYTES = 4096
MADE_FROM = re.compile(rb'<meta name="made-from" content="([0-9a-f]+)">')


def is_done(plan: Plan) -> bool:
    """Whether there is a page of the result, the pictures and the measured loss that are there now."""
    return plan.is_trained and made_from(plan.run.report) == page.inputs_digest(plan.run)


def write(plan: Plan) -> dict:
    """Write the page, whatever there is for it."""
    path = plan.run.report
    save(path, page.report([plan.run.path]))
    say(f"report: {shown(path)}")
    return {}


def made_from(path: Path) -> str:
    """What a page says that it was made from; "" where there is no page, or it is not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    found = MADE_FROM.search(content[:HEAD_BYTES])
    return found[1].decode() if found and content.rstrip().endswith(b"</html>") else ""
