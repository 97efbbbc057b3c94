import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pipeline import stages
from pipeline.devices import device, npu_smi
from pipeline.errors import UserError
from pipeline.estimate import preflight
from pipeline.methods import LORA
from pipeline.process import ranks
from pipeline.process.children import GRACE_SECONDS
from pipeline.settings.fields import Device

ROOT = Path(__file__).parents[1]


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_choosing_a_device_imports_no_mindspore():
    code = """if True:
        import sys
        from pipeline.devices import device
        print(device.choose("auto"), [name for name in sys.modules if name.startswith("mind")])
    """
    assert python(code).stdout == f"{device.choose('auto')} []\n"


@pytest.mark.skipif(any(Path("/dev").glob("davinci[0-9]*")), reason="there is an NPU here")
def test_auto_is_cpu_where_there_is_no_npu():
    assert device.choose("auto") == "CPU"


@pytest.mark.parametrize(
    "has_device, has_plugin, chosen",
    [(True, True, "Ascend"), (True, False, "CPU"), (False, True, "CPU"), (False, False, "CPU")],
)
def test_auto_takes_ascend_where_both_the_npu_and_its_plugin_are_there(
    monkeypatch, tmp_path, has_device, has_plugin, chosen
):
    for name in ("davinci_manager", *(["davinci0"] if has_device else [])):
        (tmp_path / name).touch()
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    monkeypatch.setattr(device, "_has_ascend_plugin", lambda: has_plugin)
    assert device.choose("auto") == chosen


def test_beside_an_npu_threads_prepare_inputs_on_its_share_of_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: range(32))
    for number in range(8):
        (tmp_path / f"davinci{number}").touch()
    assert device.num_host_threads("Ascend") == 4 and device.num_host_threads("CPU") == 1
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: range(192))
    assert device.num_host_threads("Ascend") == 8


@pytest.mark.parametrize("target", ["Ascend", "CPU"])
def test_a_named_device_is_taken_at_its_word(target):
    assert device.choose(target) == target


def test_every_device_that_an_experiment_may_name_says_what_it_computes():
    choices = get_args(get_type_hints(Device)["target"])
    assert set(choices) == {"auto", *device.COMPUTES}
    assert all("fp32" in dtypes for dtypes in device.COMPUTES.values())


@pytest.mark.skipif(any(Path("/dev").glob("davinci[0-9]*")), reason="there is an NPU here")
def test_ascend_without_an_npu_is_one_line_that_says_what_to_do():
    code = """if True:
        from pipeline.devices import device
        from pipeline import errors
        try:
            device.use("Ascend")
        except errors.UserError as error:
            print(error)
    """
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    (line,) = [line for line in ran.stdout.splitlines() if not line.startswith("[WARNING]")]
    assert line.startswith("device: MindSpore ") and "cannot use Ascend" in line
    assert line.endswith('check the driver and CANN, or set [device] target = "CPU"')


def test_the_process_knows_its_peak_memory(cpu):
    assert 100e6 < device.peak_memory_bytes("CPU")["process"] < 1e12


def test_compiled_steps_never_come_from_a_cache(monkeypatch, cpu, capfd):
    """With MindSpore 2.7.1 on CPU, the second process to use one has another loss, without a word."""
    monkeypatch.setenv(device.COMPILE_CACHE, "1")
    device.use("CPU")
    assert device.COMPILE_CACHE not in os.environ
    assert f"{device.COMPILE_CACHE}: not used" in capfd.readouterr().out


def test_a_machine_for_npus_that_shows_none_is_said_loudly_where_cpu_is_taken_by_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    monkeypatch.setattr(device, "ASCEND", tmp_path / "Ascend")
    for name in device.CANN:
        monkeypatch.delenv(name, raising=False)
    assert device.fallback() == ""
    monkeypatch.setenv("ASCEND_OPP_PATH", "/usr/local/Ascend/latest/opp")
    assert device.fallback().startswith("device: CPU, although CANN or its driver is here: no /dev/davinci0")
    with pytest.raises(UserError, match="there is no Ascend NPU here"):
        device.check_present("Ascend")
    (tmp_path / "davinci0").touch()
    device.check_present("Ascend")
    assert device.fallback() == ""


def test_a_stage_waits_for_an_npu_that_another_process_leaves_and_not_for_ever(monkeypatch, tmp_path, capsys):
    used = "| 1       0                 | 4242          | python                   | 60123                   |"
    smi = tmp_path / "npu-smi"
    smi.write_text(f"#!/bin/sh\nif [ -e {tmp_path}/left ]; then exit; fi\necho '{used}'\ntouch {tmp_path}/left\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv(npu_smi.VISIBLE, "1,2")
    npu_smi.wait_until_free(npu_smi.first_visible(), 1)
    assert capsys.readouterr().err == "NPU 1 is used by process 4242 (python, 60 GB): waiting 1 s at most for it\n"
    smi.write_text(f"#!/bin/sh\necho '{used}'\n")
    npu_smi.wait_until_free(1, 0.1)
    assert "still used by process 4242 (python, 60 GB); going on beside it" in capsys.readouterr().err
    npu_smi.wait_until_free(0, 60)  # nobody is on that one


def test_what_an_experiment_says_of_compiling_reaches_the_compiler(cpu, monkeypatch):
    import mindspore as ms

    given = []
    monkeypatch.setattr(ms, "jit", lambda function, **options: given.append(options))
    monkeypatch.setattr(device, "_jit_options", {})
    device.compiled(len)
    device.use_jit_options(jit_level="O1", exec_order="dfs")
    device.compiled(len)
    assert given == [{}, {"jit_level": "O1", "exec_order": "dfs"}]


def test_a_training_is_given_the_time_to_write_its_checkpoint_when_it_is_asked_to_stop(encoded):
    survey = stages.Survey(encoded.run("CheckData").experiment)
    plan = survey.plan(LORA)
    seconds = stages.grace_seconds("TrainLoRA", survey) - GRACE_SECONDS
    assert seconds == pytest.approx(preflight.checkpoint_bytes(plan) / 1e8) and seconds > 0
    assert stages.grace_seconds("EncodeT5", survey) == GRACE_SECONDS


def test_what_fails_at_the_first_operation_is_one_line_in_every_stage(encoded, monkeypatch):
    def refuse():
        raise Exception("aclrtSetDevice failed, error 507033\n  - C++ call stack: ...")

    monkeypatch.setattr(device, "_first_operation", refuse)
    with pytest.raises(UserError) as refusal:
        device.use("CPU")
    said = "device: CPU was found, but its first operation failed: aclrtSetDevice failed, error 507033 - C++ call"
    assert str(refusal.value).startswith(said) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "cores, rank, count, own",
    [
        (range(8), 1, 2, {4, 5, 6, 7}),
        ((1, 3, 5), 1, 2, {3}),
        (range(2), 1, 4, None),  # fewer cores than ranks: they share them
        (range(8), 0, 1, None),
    ],
)
def test_each_of_several_ranks_on_cpu_keeps_to_cores_of_its_own(monkeypatch, cores, rank, count, own):
    """Once: what a process is told of its place holds for the cores that it had then."""
    taken = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(taken[-1] if taken else cores))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: taken.append(set(cores)))
    place = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": rank, "MS_WORKER_NUM": count, ranks.OF_HOST: count}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    device._take_own_cores()
    device._take_own_cores()
    assert taken == ([own] if own else [])
