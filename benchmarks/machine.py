"""The machine that measures: what figures depend on besides the code."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mindspore", "mindone", "numpy", "zarr")


def machine() -> dict:
    """All of it, as `kept.json` has it.  Figures of another "kind" of machine say little about the code."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "kind": f"{cpu_name()}, {cores()} cores",
        "memory_GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    """The brand alone does not say which kind of CPU it is: virtual machines call several generations by one name."""
    pairs = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    found = {key.strip(): value.strip() for key, _, value in pairs}
    numbers = ", ".join(f"{key} {found[key]}" for key in ("cpu family", "model", "stepping") if key in found)
    return f"{found.get('model name', platform.machine())} ({numbers or 'no numbers'})"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
