"""What `doctor` says: of machines that are made of files (an NPU's driver, CANN, npu-smi), and of this one's CPU."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from terminals import terminal

from cache.terminal.output import show
from pipeline.doctor import ascend_files, doctor, golden, kernel_cases, parts
from pipeline.doctor.ascend_files import Machine

SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.3.rc1                 Version: 25.3.rc1                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | {health:<14}| 93.1        44                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          {used:<6}/ {total:<6}       |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
{processes}
"""
NOBODY = "| No running processes found in NPU 0                                                            |"
SOMEBODY = "| 0       0                 | 4242          | python                   | 60123                   |"


class Host:
    """A machine with one NPU, all of it in order, in a folder; a test takes something away."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("davinci0", *ascend_files.BESIDE):
            self.write(f"dev/{name}", "")
        self.write("usr/local/Ascend/driver/version.info", "Version=25.3.rc1\nascendhal_version=7.35.23\n")
        self.cann("8.3.RC1")
        self.te("")
        self.smi()
        self.env = {"ASCEND_OPP_PATH": "/usr/local/Ascend/ascend-toolkit/latest/opp"}
        self.env |= {"PATH": f"{root}/bin:{os.environ['PATH']}", "PYTHONPATH": f"{root}/python"}

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def cann(self, version: str) -> None:
        self.write("usr/local/Ascend/ascend-toolkit/latest/compiler/version.info", f"Version={version}\n")

    def te(self, text: str) -> None:
        self.write("python/te/__init__.py", text)

    def smi(self, health="OK", used=3400, total=65536, processes=NOBODY) -> None:
        text = SMI.format(health=health, used=used, total=total, processes=processes)
        path = self.write("bin/npu-smi", f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def findings(self, mindspore="2.7.1"):
        return list(ascend_files.look(Machine(self.root, self.env), mindspore))

    def failure(self):
        """What is wrong, in the one line of the one finding that says so."""
        (bad,) = [finding for finding in self.findings() if finding.is_bad]
        assert "\n" not in bad.said + bad.todo and bad.todo
        return f"{bad.what}: {bad.said}"


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_nothing_is_wrong_with_a_machine_that_is_in_order(host):
    found = {finding.what: finding.said for finding in host.findings() if finding.verdict == "ok"}
    assert found["device files"] == "1: davinci0" and found["driver"] == "25.3.rc1"
    assert found["CANN"].startswith("8.3.RC1 in ") and found["te"] == "can be imported"
    assert found["NPU 0"] == "910B3, OK, 62 of 66 GB free" and len(found) == 5


def test_without_a_device_file_there_is_no_npu_and_nothing_else_is_looked_at(host):
    (host.root / "dev/davinci0").unlink()
    first, second = host.findings()
    assert "the driver is installed, but shows no device" in first.said and second.verdict == "skipped"


def test_each_thing_that_may_be_wrong_is_one_line(host):
    """In the order in which an owner would meet them; each is put right again."""
    host.cann("8.0.RC3")
    assert host.failure() == "CANN: 8.0.RC3"
    host.cann("8.3.RC1")
    opp = host.env.pop("ASCEND_OPP_PATH")
    assert "but its environment is not set" in host.failure()
    host.env["ASCEND_OPP_PATH"] = opp
    host.te("import pathlib2")
    assert host.failure() == "te: needs pathlib2"
    host.te("raise ImportError('libascendcl.so: cannot open shared object file')")
    assert host.failure() == "te: cannot be imported: ImportError: libascendcl.so: cannot open shared object file"
    host.te("")
    host.smi(used=63800, processes=SOMEBODY)
    assert host.failure() == "NPU 0: 910B3, OK, 2 of 66 GB free: taken by process 4242 (python, 60 GB)"
    host.smi(used=500, total=2000)
    assert host.failure() == "NPU 0: 910B3, OK, 2 of 2 GB free"
    host.smi(health="Alarm")
    assert host.failure() == "NPU 0: 910B3, Alarm, 62 of 66 GB free"
    host.smi()
    host.env["ASCEND_RT_VISIBLE_DEVICES"] = "0,3"
    assert host.failure() == "ASCEND_RT_VISIBLE_DEVICES: 0,3, but there is no device 3"
    del host.env["ASCEND_RT_VISIBLE_DEVICES"]
    (host.root / "dev/hisi_hdc").unlink()
    assert host.failure() == "device files: /dev/hisi_hdc is missing"


def test_what_is_not_understood_or_not_there_is_a_note_and_no_failure(host):
    (host.root / "bin/npu-smi").write_text("#!/bin/sh\necho something new\n")
    (host.root / "usr/local/Ascend/driver/version.info").unlink()
    notes = {finding.what for finding in host.findings() if finding.verdict == "note"}
    assert notes == {"npu-smi", "driver"} and not any(finding.is_bad for finding in host.findings())
    assert not any(finding.is_bad for finding in host.findings("3.0.0"))  # a MindSpore of which nothing is known


def test_chips_of_a_device_with_two_are_read_in_order():
    text = """\
| 0     Ascend910           | OK            | 178.5       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3416 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | Warning       | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          26838/ 32768         |
"""
    assert [tuple(vars(chip).values()) for chip in ascend_files.read_chips(text)] == [
        ("Ascend910", "OK", 3416, 65536),
        ("Ascend910", "Warning", 26838, 32768),
    ]


def test_where_something_fails_nothing_is_started_on_the_device(host, monkeypatch):
    host.cann("7.0")
    monkeypatch.setattr(doctor, "_run_parts", None)
    findings = list(doctor.examine("Ascend", Machine(host.root, host.env)))
    assert findings[-1].verdict == "skipped"
    assert doctor.verdict(findings).startswith("1 of ") and "the first: CANN: 7.0" in doctor.verdict(findings)
    with terminal() as seen:
        show(*map(doctor.as_table, findings))
    assert max(map(len, seen.lines)) <= 80 and any(line.startswith("FAILED   CANN: 7.0") for line in seen.lines)


def test_the_report_holds_no_more_of_the_environment_than_what_is_about_the_device(host):
    host.env["HF_TOKEN"] = "hf_secret"
    report = doctor.as_json(host.findings(), Machine(host.root, host.env))
    assert "hf_secret" not in report and "910B3" in json.loads(report)["npu-smi info"]


def test_a_part_that_never_ends_is_stopped_and_said(monkeypatch):
    monkeypatch.setattr(doctor, "PART_SECONDS", 0.2)
    findings = list(doctor._run_parts("CPU"))
    assert [finding.verdict for finding in findings] == ["FAILED", "skipped"]
    assert "took more than 0.2 s" in findings[0].said


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(cpu, tmp_path_factory):
    """The outputs of the embedded model on this CPU, and what repeating gave."""
    return golden.run(tmp_path_factory.mktemp("golden"), "fp32", "CPU")


def bad(findings) -> list[str]:
    return [finding.what for finding in findings if finding.is_bad]


def test_this_cpu_computes_the_golden_numbers_and_repeats_itself(computed):
    outputs, repeated = computed
    assert bad(repeated) == [] and bad(golden.compared(outputs, golden.golden(), "fp32")) == []
    assert outputs.keys() == golden.golden().keys() and len(repeated) == 2


def test_a_bent_number_and_a_wrong_dtype_are_named(computed):
    outputs, wanted = computed[0], golden.golden()
    for name in wanted:
        bent = wanted | {name: wanted[name] * np.float32(1.01)}
        assert bad(golden.compared(outputs, bent, "fp32")) == [name]
        half = outputs | {name: outputs[name].astype(np.float16).astype(np.float32) * np.float32(1 + 2**-7)}
        assert bad(golden.compared(half, wanted, "fp32")) == [name]
        assert bad(golden.compared(outputs | {name: outputs[name][:1]}, wanted, "bf16")) == [name]


def test_a_broken_kernel_is_named(cpu, monkeypatch):
    from mindspore.mint.nn import functional

    right = functional.gelu
    some = [case for case in kernel_cases.CASES if case.name in ("gelu", "Linear", "split")]
    monkeypatch.setattr(parts, "CASES", some)
    assert bad(parts.all_kernels("CPU")) == []
    monkeypatch.setattr(functional, "gelu", lambda x, approximate="none": right(x, approximate=approximate) * 1.05)
    assert bad(parts.all_kernels("CPU")) == ["gelu, fp32", "gelu, fp16"]

    def refuse(x, approximate="none"):
        raise RuntimeError("aclnnGelu failed, error code 561103\nmore lines")

    monkeypatch.setattr(functional, "gelu", refuse)
    (first, *_) = [finding for finding in parts.all_kernels("CPU") if finding.is_bad]
    assert first.said == "RuntimeError: aclnnGelu failed, error code 561103 more lines"


def test_an_optimizer_that_computes_something_else_is_named(cpu, monkeypatch):
    monkeypatch.setattr(parts, "NUM_TENSORS", 6)
    assert bad(parts.large_update("CPU")) == []
    right = parts._updated
    monkeypatch.setattr(parts, "_updated", lambda *given: [values * 1.001 for values in right(*given)])
    assert bad(parts.large_update("CPU")) == ["update of 6 tensors"]


@pytest.mark.slow
def test_the_whole_of_it_on_this_cpu():
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor", "--target", "CPU"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines) and not any(line.startswith("FAILED") for line in lines)
    assert last.startswith("Everything computes as it should") and sum("equal to the last bit" in x for x in lines) >= 3
