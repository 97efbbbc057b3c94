"""What an Ascend machine says about itself without MindSpore: device files, driver, CANN, ``te``, ``npu-smi``.

Nobody of this project has an NPU: paths and formats are those of Huawei's installation guides and of outputs that users
have published.  What is not understood is said as it stands, never taken for an error.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.devices.npu_smi import VISIBLE, read_chips, read_processes
from pipeline.doctor.finding import Finding, failed, note, ok, skipped

FITTING_CANN = {
    "2.7": ("8.2", "8.3"),
    "2.8": ("8.2", "8.3", "8.5"),
    "2.9": ("8.2", "8.3", "8.5", "9.0"),
    "2.10": ("8.2", "8.3", "8.5", "9.0", "9.1"),
}
"""By MindSpore's version, as its own check of the environment has it (mindspore/run_check/_check_version.py)."""

RECOMMENDED = {"2.7": ("25.3", "8.3")}
"""Driver and CANN that MindSpore's installation page names."""

TE_NEEDS = ("decorator", "sympy", "attr", "cffi", "absl", "Cython", "pathlib2", "cloudpickle", "psutil", "scipy")
"""Modules that CANN's ``te`` imports; the extra ``ascend`` installs them."""

BESIDE = ("davinci_manager", "devmm_svm", "hisi_hdc")
"""Device files that the driver needs beside those of the NPUs."""

NEEDED_GB = 4
"""Free memory of a device without which not even the small model's stages are worth starting."""

SECONDS = 60


@dataclass(frozen=True)
class Machine:
    """Where to look.  root: the file system's.  run: a command's output, or what is wrong, in a line, as OSError."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=dict(self.environment), check=False
        )
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()
            raise OSError(lines[-1])
        return done.stdout


def look(machine: Machine, mindspore_version: str) -> Iterator[Finding]:
    """All findings, in the order in which things are put right: device files, driver, CANN, te, device."""
    devices = _names(machine)
    if not devices:
        driver = machine.path("/usr/local/Ascend/driver")
        why = "the driver is installed, but shows no device" if driver.is_dir() else "no NPU, or no driver"
        todo = "in a container, pass the devices on (--device /dev/davinci0 ...), as docs/ascend.md shows"
        yield note("device files", f"none of /dev/davinci0, ...: {why}", todo)
        yield skipped("driver, CANN, te, npu-smi", "there is no device that they would be for")
        return
    yield from _devices(machine, devices)
    release = ".".join(mindspore_version.split(".")[:2])
    yield _driver(machine, release)
    cann = _cann(machine, mindspore_version, release)
    yield cann
    yield skipped("te", "needs CANN's environment") if cann.is_bad else _te(machine)
    yield from _chips(machine)


def has_devices(machine: Machine) -> bool:
    return bool(_names(machine))


def _names(machine: Machine) -> list[str]:
    return sorted(path.name for path in machine.path("/dev").glob("davinci[0-9]*"))


def _devices(machine: Machine, devices: list[str]) -> Iterator[Finding]:
    closed = [name for name in devices if not os.access(machine.path(f"/dev/{name}"), os.R_OK | os.W_OK)]
    if closed:
        todo = "add this user to the group that owns them, usually HwHiAiUser, and log in again"
        yield failed("device files", f"no permission for /dev/{closed[0]}", todo)
    else:
        yield ok("device files", f"{len(devices)}: {', '.join(devices)}")
    missing = [name for name in BESIDE if not machine.path(f"/dev/{name}").exists()]
    if missing:
        yield failed("device files", f"/dev/{missing[0]} is missing", "in a container, pass it on with --device too")
    visible = machine.environment.get(VISIBLE, "")
    wrong = [each for each in filter(None, visible.split(",")) if f"davinci{each.strip()}" not in devices]
    if wrong:
        yield failed(
            VISIBLE, f"{visible}, but there is no device {wrong[0]}", "unset it, or name devices that are there"
        )
    elif visible:
        yield ok(VISIBLE, visible)


def _driver(machine: Machine, release: str) -> Finding:
    path = machine.path("/usr/local/Ascend/driver/version.info")
    version = _version_in(path)
    if not version:
        return note("driver", f"no version in {path}", "in a container, mount /usr/local/Ascend/driver")
    wanted = RECOMMENDED.get(release, ("", ""))[0]
    if wanted and not _is_at_least(version, wanted):
        return note("driver", version, f"MindSpore {release} names {wanted}; if the next lines fail, update it first")
    return ok("driver", version)


def cann_folder(machine: Machine) -> Path | None:
    """Where CANN's environment says that it is; else the place of a default installation."""
    env = machine.environment
    opp = env.get("ASCEND_OPP_PATH")
    named = env.get("ASCEND_HOME_PATH") or env.get("ASCEND_TOOLKIT_HOME") or (opp and str(Path(opp).parent))
    folder = machine.path(named) if named else machine.path("/usr/local/Ascend/ascend-toolkit/latest")
    return folder if folder.is_dir() else None


def _cann(machine: Machine, mindspore_version: str, release: str) -> Finding:
    folder = cann_folder(machine)
    if folder is None:
        return failed("CANN", "not found", "install CANN's toolkit and kernels, see docs/ascend.md")
    if "ASCEND_OPP_PATH" not in machine.environment:
        script = folder.parent / "set_env.sh"
        return failed("CANN", f"installed in {folder}, but its environment is not set", f"source {script}")
    places = [folder / "compiler" / "version.info", *folder.glob("*-linux/ascend_toolkit_install.info")]
    version = next(filter(None, map(_version_in, places)), "")
    if not version:
        return note("CANN", f"no version in {places[0]}", f"MindSpore {release} names {RECOMMENDED.get(release)}")
    fitting = FITTING_CANN.get(release)
    if fitting and ".".join(version.split(".")[:2]) not in fitting:
        wanted = " or ".join(fitting)
        todo = f"MindSpore {mindspore_version} wants {wanted}: install that, or another MindSpore"
        return failed("CANN", version, todo)
    return ok("CANN", f"{version} in {folder}")


def _te(machine: Machine) -> Finding:
    try:
        machine.run(sys.executable, "-c", "import te")
    except (OSError, subprocess.TimeoutExpired) as error:
        missing = re.search(r"No module named '(\w+)", str(error))
        if missing and missing[1] in TE_NEEDS:
            return failed("te", f"needs {missing[1]}", "pip install 'mindspore-flux-finetune[ascend]'")
        todo = "source CANN's set_env.sh in this shell, or install the te wheel from CANN's lib64 with this Python"
        return failed("te", f"cannot be imported: {error}", todo)
    return ok("te", "can be imported")


def _chips(machine: Machine) -> Iterator[Finding]:
    try:
        said = machine.run("npu-smi", "info")
    except (OSError, subprocess.TimeoutExpired) as error:
        yield note("npu-smi", f"not asked: {error}", "mount it into the container to have health and memory looked at")
        return
    chips = read_chips(said)
    if not chips:
        yield note("npu-smi", "its output was not understood", "look at `npu-smi info` yourself; please send it to us")
        return
    users = read_processes(said)
    for number, chip in enumerate(chips):
        what, free_gb = f"NPU {number}", (chip.total_mb - chip.used_mb) / 1000
        said = f"{chip.name}, {chip.health}, {free_gb:.0f} of {chip.total_mb / 1000:.0f} GB free"
        if chip.health != "OK":
            yield failed(what, said, f"npu-smi info -t health -i {number} says more")
        elif free_gb < NEEDED_GB and chip.total_mb >= 1000 * NEEDED_GB:
            by = ", ".join(map(str, users.get(number, []))) or "somebody"
            yield failed(what, f"{said}: taken by {by}", f"wait, or choose another by {VISIBLE}")
        elif free_gb < NEEDED_GB:
            yield failed(what, said, "too small for any of the models")
        else:
            yield ok(what, said)


def _version_in(path: Path) -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    match = re.search(r"^version=(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return match[1] if match else ""


def _is_at_least(version: str, wanted: str) -> bool:
    """By the numbers in them, as far as the wanted one has any."""
    numbers = [[int(each) for each in re.findall(r"\d+", text)] for text in (version, wanted)]
    return numbers[0][: len(numbers[1])] >= numbers[1]
