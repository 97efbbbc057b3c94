"""``python -m pipeline doctor``: what an NPU's owner types first, and sends us where something is wrong."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from cache import load_json, printable
from cache.terminal.output import bad, good, warning
from cache.terminal.table import Table
from pipeline.devices import device
from pipeline.doctor import ascend_files
from pipeline.doctor.ascend_files import Machine
from pipeline.doctor.finding import Finding, failed, note, ok, skipped
from pipeline.process import children
from pipeline.process.progress import busy

DISTRIBUTION = "mindspore-flux-finetune"
PART_SECONDS = 900
"""The longest that a part may take: a first operation on a new NPU may compile for minutes."""


def examine(target: str, machine: Machine | None = None) -> Iterator[Finding]:
    """All findings, each as soon as it is made.  target: "auto", "Ascend" or "CPU", as in an experiment file."""
    machine = machine or Machine()
    yield ok("machine", _machine())
    yield from _packages()
    version = importlib.metadata.version("mindspore")
    found = list(ascend_files.look(machine, version))
    yield from found
    chosen = device.choose(target)
    if chosen == "CPU":
        yield note("device", "CPU: what follows says nothing of an NPU")
    elif any(each.is_bad for each in found) or not ascend_files.has_devices(machine):
        yield skipped("all that runs on the device", "put right what is said above; --target CPU looks at the rest")
        return
    yield from _run_parts(chosen)


def _machine() -> str:
    memory = device.memory_bytes("CPU", 0) / 1e9
    name = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GB"


def _packages() -> Iterator[Finding]:
    """The versions that are installed against those that setup.cfg asks for."""
    found, wrong = [], []
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.name in ("mindspore", "mindone", "numpy", "zarr", "transformers"):
            found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
    yield ok("packages", ", ".join(found))
    for each in wrong:
        yield failed("packages", each, "pip install -c constraints.txt, into an environment of its own")


def _run_parts(target: str) -> Iterator[Finding]:
    from pipeline.doctor import parts

    for name in parts.parts_of(target):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="doctor-") as folder, busy(f"{name}, in a process of its own"):
            out, log = Path(folder) / "findings", Path(folder) / "log"
            with open(log, "w") as file:
                code = _child(["doctor-part", name, target, str(out)], file)
            findings = _read(out)
            said = log.read_text(errors="replace")
        yield from findings
        if code:
            why = f"took more than {PART_SECONDS} s" if code == TIMED_OUT else children.reason(code)
            last = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing")
            yield failed(name, f"{why}; it said last: {printable(last)[:200]}", "please send us this report")
        if name == "first operation" and (code or any(each.is_bad for each in findings)):
            yield skipped("kernels and model", "the first operation failed")
            return
        yield ok(f"time of {name}", f"{time.monotonic() - began:.0f} s")


TIMED_OUT = 124


def _child(arguments: list[str], log) -> int:
    try:
        return children.run(arguments, stdout=log, stderr=log, seconds=PART_SECONDS)
    except subprocess.TimeoutExpired:
        return TIMED_OUT


def _read(path: Path) -> list[Finding]:
    if not path.is_file():
        return []
    return [Finding(**load_json(line)) for line in path.read_text().splitlines()]


MARKS = {"ok": good, "note": warning, "FAILED": bad, "skipped": warning}


def as_table(finding: Finding) -> Table:
    """For people: the verdict, and beside it what was found of what; what to do stands below."""
    rows = [(MARKS[finding.verdict](f"{finding.verdict:<7}"), f"{finding.what}: {finding.said}")]
    return Table(["", ""], [*rows, *([("", f"-> {finding.todo}")] if finding.todo else [])])


def verdict(findings: list[Finding]) -> str:
    """The last line: what all of it means."""
    bad = [finding for finding in findings if finding.is_bad]
    has_npu = not any(each.what == "device files" and each.verdict == "note" for each in findings)
    where = "" if has_npu else " on this CPU; no NPU was there, so nothing is known of one"
    if not bad:
        return f"Everything computes as it should{where}."
    return f"{len(bad)} of {len(findings)} FAILED{where}; the first: {bad[0].what}: {bad[0].said}"


def as_json(findings: list[Finding], machine: Machine) -> str:
    """The report to send us: all findings, and what tools said."""
    report: dict = {"findings": [dataclasses.asdict(each) for each in findings], "verdict": verdict(findings)}
    report["environment"] = {
        name: value for name, value in machine.environment.items() if name.startswith(("ASCEND_", "MS_", "HCCL_"))
    }
    try:
        report["npu-smi info"] = machine.run("npu-smi", "info")
    except (OSError, subprocess.TimeoutExpired) as error:
        report["npu-smi info"] = f"not asked: {error}"
    return json.dumps(report, indent=2)
