"""The device: what it is, what it computes, and all that differs between Ascend and CPU.

`choose` imports no MindSpore, so that the scheduler can ask; `use` sets the process up for the device.
"""

import contextlib
import gc
import importlib.util
import io
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.devices import by_need, kept_graphs, npu_smi
from pipeline.errors import UserError
from pipeline.process import cores, ranks
from pipeline.process.bulk import made_in_bulk
from pipeline.process.progress import say
from pipeline.settings.fields import Device

COMPILE_CACHE = kept_graphs.ENABLE
COMPUTES = {"Ascend": ("bf16", "fp16", "fp32"), "CPU": ("fp32", "fp16")}
"""What each device computes, by preference.  MindSpore's CPU backend has almost no bf16 kernels."""

NUMERICS = {"Ascend": 2, "CPU": 4}
"""Of what each device computes with, the version of the last bits: it grows when they change and nothing else does.

2: the squares of all gradients are summed at once; on CPU also the gradients of `cpu_gradients`, and a fused AdamW.
3: on CPU the optimizer steps in NumPy, and normalisations multiply their factors first.
4: on CPU the rotary embedding's frequencies come from the host, and queries and keys are normalised together.
"""

TIDYING_SECONDS = 5e-5
"""How long a graph's results are left alone; see `_waiting_asleep`."""

DEVICES = Path("/dev")
ASCEND = Path("/usr/local/Ascend")
CANN = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH")
"""What CANN's set_env.sh sets."""

CONTAINERS = (
    "; a container is given it by --device (python -m pipeline doctor says more), and [device] target = 'CPU' means CPU"
)


def choose(target: str) -> str:
    """``"Ascend"`` or ``"CPU"`` for ``"auto"``: Ascend where a device and MindSpore's Ascend plugin are present."""
    if target != "auto":
        return target
    return "Ascend" if num_npus() and _has_ascend_plugin() else "CPU"


def num_npus() -> int:
    """How many this machine has: the driver shows each as /dev/davinci0, /dev/davinci1, ..."""
    return sum(path.name[len("davinci") :].isdigit() for path in DEVICES.glob("davinci*"))


def num_visible(device: str) -> int:
    """How many devices this process may use; ASCEND_RT_VISIBLE_DEVICES can leave it some of the NPUs."""
    if device == "CPU":
        return 1
    named = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    return len(named.split(",")) if named else num_npus()


MOST_HOST_THREADS = 8


def num_host_threads(device: str) -> int:
    """How many threads prepare inputs while the device computes: of this process's share of the cores.

    On CPU, where all cores compute, one.
    """
    if device == "CPU":
        return 1
    return max(1, min(MOST_HOST_THREADS, len(os.sched_getaffinity(0)) // max(1, num_npus())))


def _has_ascend_plugin() -> bool:
    spec = importlib.util.find_spec("mindspore")
    return bool(spec and spec.origin and any(Path(spec.origin).parent.glob("lib/plugin/libmindspore_ascend*")))


def memory_bytes(device: str, memory_gb: float) -> int:
    """What there is to compute in: the machine's memory for CPU, else ``memory_gb``."""
    if device != "CPU":
        return int(memory_gb * 1e9)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def use(device: str, settings: Device | None = None) -> None:
    """Set this process up for ``device``: on CPU with substitutes for kernels that MindSpore lacks there, see `cpu`; on
    Ascend so that float32 is computed in float32, see `ascend`.

    Raises UserError where MindSpore cannot use the device.  Call it before the first operation.
    """
    is_first = "mindspore" not in sys.modules
    with made_in_bulk():
        _set_up(device, settings)
    if is_first:
        gc.freeze()  # modules stay until the end: nobody need look through them for garbage
    _touch(device)


def load_libraries() -> None:
    """Import what `use` and stages need, without touching a device: see `pipeline.process.template`."""
    with made_in_bulk():
        _import_mindspore()
        _import_mindone()


def _import_mindspore():
    _without_compile_cache()
    import mindspore as ms

    return ms


def _set_up(device: str, settings: Device | None) -> None:
    if device == "CPU":
        _take_own_cores()
    ms = _import_mindspore()
    try:
        ms.set_device(device, *_own_number(device))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"device: MindSpore {ms.__version__} cannot use {device}: {reason}; "
            'check the driver and CANN, or set [device] target = "CPU"'
        ) from None
    _import_mindone()
    if device == "CPU":
        from pipeline.devices import cpu

        ms.runtime.launch_blocking()
        cpu.install()
    else:
        from pipeline.devices import ascend

        ascend.prepare(settings or Device())


def _touch(device: str) -> None:
    """Compute something: only then do a driver, a permission or a lack of memory show, some as bare Exceptions."""
    try:
        _first_operation()
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"device: {device} was found, but its first operation failed: {said}; python -m pipeline doctor looks for "
            "the reason"
        ) from error


def _first_operation() -> None:
    import mindspore as ms

    (ms.Tensor([1.0, 2.0], ms.float32) + 1).asnumpy()


def _take_own_cores() -> None:
    """Where this is one of several ranks that were started together; once, as a share of a share would be less."""
    cores.keep_to_own(ranks.place().rank, int(os.environ.pop(ranks.OF_HOST, "1")))


def _own_number(device: str) -> tuple[int, ...]:
    """The number of the NPU that this process uses, where it is one of several ranks."""
    return (int(os.environ["DEVICE_ID"]),) if device != "CPU" and ranks.is_rank() else ()


def _without_compile_cache() -> None:
    """Keep MindSpore from taking compiled steps from a cache by itself: it may be of other ones, see `kept_graphs`."""
    if os.environ.pop(COMPILE_CACHE, "0") == "1":
        say(f"{COMPILE_CACHE}: not used, as MindSpore may take another graph from there; see [device] keep_compiled")
    if "GLOG_v" not in os.environ:  # no warnings about a cache that is empty, or that is not
        os.environ.setdefault("MS_SUBMODULE_LOG_v", "{PIPELINE:3}")


_jit_options: dict[str, str] = {}
"""Of this process, as `use` was told."""


def use_jit_options(**options: str) -> None:
    _jit_options.update(options)


def compiled(function: Callable, parameters: Iterable = ()) -> Callable:
    """``mindspore.jit``, with the options that the experiment has for the device; on CPU, calls wait for their results.

    parameters: all that a function reads, where it is no cell, so that its graph can be kept: see `kept_graphs`.
    """
    import mindspore as ms

    run = ms.jit(kept_graphs.cell_of(function, parameters) if parameters else function, **_jit_options)
    return _waiting_asleep(run) if is_cpu() else run


def _waiting_asleep(run: Callable) -> Callable:
    """``run``, which returns when its results are there.

    Reading a result, or running another operation, while a compiled graph still runs makes MindSpore's main thread spin
    (AsyncRQueue::Wait) on a core that the graph's kernels need: on two cores a step then takes up to five times as
    long.  Asking for a shape waits without spinning.  When the results are there a thread of MindSpore's tidies up, and
    who reads one meanwhile may spin on that thread's core until a slice of time, 4 ms, ends; hence the short sleep.
    """

    def wait(*arguments, **named):
        results = run(*arguments, **named)
        _ask_for_shapes(results)
        time.sleep(TIDYING_SECONDS)
        return results

    return wait


def _ask_for_shapes(results) -> None:
    if isinstance(results, tuple | list):
        for each in results:
            _ask_for_shapes(each)
    else:
        getattr(results, "shape", None)  # what is computed while a graph is compiled has none


def jit_options() -> dict[str, str]:
    return dict(_jit_options)


def numerics() -> int:
    """The version, of `NUMERICS`, of the device that this process uses."""
    import mindspore as ms

    return NUMERICS[ms.get_context("device_target")]


def steps_on_host() -> bool:
    """Whether the optimizer steps in NumPy, in the memory that the device computes with."""
    return is_cpu()


def is_cpu() -> bool:
    """Whether this process computes on CPU."""
    import mindspore as ms

    return ms.get_context("device_target") == "CPU"


def details(device: str, settings: Device) -> dict:
    """Of the device that this process uses, for the record: which, its memory in bytes, and what else it was told."""
    found: dict = {"memory_bytes": memory_bytes(device, settings.memory_gb), "machine": platform.machine()}
    if device != "CPU":
        chips, number = npu_smi.read_chips(npu_smi.asked()), npu_smi.first_visible()
        found |= {"number": number, "visible": os.environ.get(npu_smi.VISIBLE, "all"), "of": num_npus()}
        found |= {"npu": chips[number].name if number < len(chips) else "unknown"}
        found |= {"deterministic": settings.deterministic, "jit": dict(_jit_options)}
    return found


def check_present(device: str) -> None:
    """Raise UserError where this machine has no such device.  Imports no MindSpore."""
    if device == "Ascend" and not num_npus():
        raise UserError(f"device: there is no Ascend NPU here: no /dev/davinci0{CONTAINERS}")


def fallback() -> str:
    """What to say where CPU was chosen by itself although this looks like a machine for NPUs; "" elsewhere."""
    if num_npus() or not (any(name in os.environ for name in CANN) or ASCEND.is_dir()):
        return ""
    return f"device: CPU, although CANN or its driver is here: no /dev/davinci0{CONTAINERS}"


def _import_mindone() -> None:
    """Import mindone without the notices that it and transformers print for models nobody here uses.

    What mindone warns of while loading weights is an error here, raised by `models.load_model`.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # mindone's, imported first, has its own stand in for transformers'
        os.environ.setdefault(f"{library}_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    by_need.install()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", FutureWarning)
        _import_models()
    logging.getLogger("mindone").setLevel(logging.ERROR)


def _import_models() -> None:
    """Import what stages use, before substitutes are installed: a table of mindone's may hold what is replaced."""
    import transformers.models.auto.modeling_auto  # noqa: F401  # the rest of mindone expects somebody to have done so
    from mindone.diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel  # noqa: F401
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler as Scheduler  # noqa: F401
    from mindone.peft import LoraConfig, LoraModel  # noqa: F401
    from mindone.transformers import CLIPTextModel, T5EncoderModel  # noqa: F401


def peak_resident_bytes() -> int:
    """From Linux, of this program alone: getrusage counts in what the process was before it became this program."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def peak_memory_bytes(device: str) -> dict:
    """Peak resident memory of this process and, where the device has memory of its own, of the device."""
    peaks = {"process": peak_resident_bytes()}
    if device != "CPU":
        import mindspore as ms

        peaks["device"] = ms.runtime.max_memory_allocated()
    return peaks
