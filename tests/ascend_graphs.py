"""The graphs that MindSpore compiles for Ascend, as far as a machine without an NPU can: their primitives and dtypes.

What `pipeline.devices.cpu` substitutes on CPU is not substituted here.  MindSpore resolves, differentiates, infers
types and validates a graph before it looks for kernels, and writes it down then; a kernel that is missing here ends it
later.

As a program it compiles graphs in one dtype and writes their rows to rows.json, see `compiled`; to told.json what
MindSpore was told before, of which it takes note without an NPU too; and to documented.json the devices that the
operations we call are documented for.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NAMES = ("lora", "controlnet", "vae encode", "vae decode", "clip", "t5", "optimizer")
TEXT, SIDE = 16, 8


class Row(NamedTuple):
    """A primitive of a graph, with the dtypes of its tensors, and the line of mindone or of ours that it comes from."""

    graph: str
    primitive: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    line: str


def compiled(dtype: str, folder: Path, names: Iterable[str] = NAMES, attention: str = "ours") -> Counter:
    """How often each Row is in the graphs of these names, under a policy of ``dtype``; compiled in another process.

    attention: of float32; "ours", as on Ascend, or "mindone's".
    """
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}",
        "MS_DEV_SAVE_GRAPHS": "2",
        "MS_DEV_SAVE_GRAPHS_PATH": f"{folder / 'ir'}",
    }
    command = [sys.executable, __file__, dtype, str(folder), attention, *names]
    child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    rows = json.loads((folder / "rows.json").read_text())
    return Counter({Row(*graph, tuple(inputs), tuple(outputs), line): n for *graph, inputs, outputs, line, n in rows})


# --- reading a graph that was written down ------------------------------------------------------------------------

NODE = re.compile(r"\s+%\d+\(.*?\) = (?:PrimFunc_)?([A-Za-z_]\w*)\(")
TENSOR = re.compile(r"Tensor\[(\w+)\]")
SOURCE = re.compile(r"# In file (\S+?):(\d+)")
VIRTUAL = {
    *("Load", "UpdateState", "Depend", "MakeTuple", "TupleGetItem", "Return", "StopGradient", "MakeList"),
    *("Partial", "Switch", "make_tuple", "tuple_getitem", "make_list", "list_getitem", "stop_gradient", "return"),
}
"""What the compiler itself resolves: no kernel is asked for."""


def rows(graph: str, path: Path) -> Iterator[Row]:
    """The rows of a graph in MindSpore's notation: a line for a node, one for its types, and those it comes from."""
    lines = path.read_text().splitlines()
    nodes = [(number, match[1]) for number, line in enumerate(lines) if (match := NODE.match(line))]
    ends = [number for number, _ in nodes[1:]] + [len(lines)]
    for (number, name), end in zip(nodes, ends):
        if name not in VIRTUAL:
            inputs, _, outputs = lines[number + 1].rpartition(" -> ")
            types = tuple(TENSOR.findall(inputs)), tuple(TENSOR.findall(outputs))
            yield Row(graph, name, *types, _source(lines[number + 2 : end]))


def _source(lines: list[str]) -> str:
    """The innermost line of a node; "" where it is MindSpore's, whose functions stand for all callers at once."""
    places = [match.groups() for line in lines if (match := SOURCE.search(line))]
    if not places or "/mindspore/" in places[-1][0]:
        return ""
    file, line = places[-1]
    return f"{file.rpartition('site-packages/')[2].removeprefix(f'{ROOT}/')}:{line}"


# --- compiling ----------------------------------------------------------------------------------------------------


def _compile_all(dtype: str, folder: Path, attention: str, names: list[str]) -> None:
    import mindspore as ms

    ms.set_device("CPU")
    from pipeline.devices import device

    device._import_mindone()
    from pipeline.devices import ascend, fp32
    from pipeline.settings.fields import Device

    if attention == "ours":
        ascend.prepare(Device())
    else:
        fp32.keep_attention = lambda model: None
    from ascend_source import OURS, documented
    from mindspore.device_context.ascend.op_precision import function_status

    (folder / "documented.json").write_text(json.dumps(documented(OURS)))

    told = {"HCCL_DETERMINISTIC": os.environ.get("HCCL_DETERMINISTIC"), **function_status}
    (folder / "told.json").write_text(json.dumps(told))
    counts: Counter[Row] = Counter()
    for name in names:
        before = set((folder / "ir").glob("*_validate_*.ir"))
        compute = MAKERS[name](name, dtype)
        try:
            compute()
        except (RuntimeError, TypeError) as error:
            print(name, type(error).__name__, str(error)[:1000])
        found = set((folder / "ir").glob("*_validate_*.ir")) - before
        assert found, f"{name} in {dtype}: MindSpore ended before it validated the graph"
        for path in found:
            counts.update(rows(name, path))
    (folder / "rows.json").write_text(json.dumps([[*row, number] for row, number in counts.items()]))


def _compiling(function: Callable, *arguments) -> Callable:
    import mindspore as ms

    return lambda: ms.jit(function)(*arguments)


def _tensor(shape: tuple, dtype: str):
    import mindspore as ms
    import numpy as np

    from pipeline.devices.tensors import mindspore_dtype

    return ms.Tensor(np.full(shape, 0.5, np.float32), mindspore_dtype(dtype))


def _training(name: str, dtype: str) -> Callable:
    """The loss of a batch and its gradients, as `pipeline.training.loop` compiles them."""
    import mindspore as ms

    from pipeline.devices.precision import Policy
    from pipeline.flux import models
    from pipeline.flux.prediction import prediction
    from pipeline.methods import controlnet_model, lora_dropout, lora_layers
    from pipeline.settings.experiment import EMBEDDED, Experiment
    from pipeline.settings.fields import ControlNet, Lora
    from pipeline.training.loss import flow_loss

    transformer, policy = models.load_model(EMBEDDED, "transformer", dtype), Policy("fp32", dtype, dtype)
    networks = {"transformer": transformer}
    if name == "lora":
        adapted = lora_layers.Adapted(networks, Lora(dropout=0.1, targets="all-linear"), policy, seed=0)
        lora_dropout._check = lambda *_: None  # it would compute, for which there are no kernels here
        adapted.add_dropout()
        trained = adapted.trained
    else:
        experiment = Experiment(controlnet=ControlNet(num_double_layers=1, num_single_layers=1))
        networks["controlnet"] = controlnet_model.make(transformer, experiment, policy)
        trained = list(networks["controlnet"].get_parameters())
    loss, tokens = flow_loss(prediction(**networks)), (2, SIDE * SIDE, 64)
    arguments = (
        *(_tensor(tokens, dtype), _tensor(tokens, "fp32"), _tensor((2, TEXT, 96), dtype), _tensor((2, 64), dtype)),
        *(_tensor((2,), dtype), _tensor((SIDE * SIDE, 3), "fp32"), _tensor((TEXT, 3), "fp32")),
        *(_tensor((2,), "fp32"), _tensor((2,), dtype), *([_tensor(tokens, dtype)] if name == "controlnet" else [])),
    )
    return _compiling(ms.value_and_grad(loss, None, ms.ParameterTuple(trained)), *arguments)


def _vae(name: str, dtype: str) -> Callable:
    from mindone.diffusers.models.attention_processor import Attention

    from pipeline.flux import models
    from pipeline.settings.experiment import EMBEDDED

    vae = models.load_model(EMBEDDED, "vae", dtype)
    for _, cell in vae.cells_and_names():
        if isinstance(cell, Attention):
            cell.fa_op_available = True  # as on Ascend

    def encode(pixels):
        return vae.encode(pixels)[0]

    def decode(latents):
        return vae.decode(latents)[0]

    if name == "vae encode":
        return _compiling(encode, _tensor((1, 3, 64, 64), dtype))
    return _compiling(decode, _tensor((1, 16, SIDE, SIDE), dtype))


def _encoder(name: str, dtype: str) -> Callable:
    import mindspore as ms
    import numpy as np

    from pipeline.flux import models
    from pipeline.settings.experiment import EMBEDDED

    component, output, length = ("text_encoder_2", 0, 32) if name == "t5" else ("text_encoder", 1, 77)
    model = models.load_model(EMBEDDED, component, dtype)

    def encode(tokens):
        return model(tokens)[output]

    return _compiling(encode, ms.Tensor(np.ones((1, length), np.int32)))


def _optimizer(name: str, dtype: str) -> Callable:
    """The steps of all optimizers, with averages of the weights and clipping."""
    import mindspore as ms

    from pipeline.devices import device
    from pipeline.settings.fields import Train
    from pipeline.training import compiled_step, optimizer

    device.is_cpu = lambda: False

    def update():
        for kind in compiled_step.RULES:
            trained = [ms.Parameter(_tensor((4, 8), "fp32"), name=f"{kind}.{number}") for number in range(2)]
            settings = Train(optimizer=kind, ema_decay=0.99)
            optimizer.Optimizer(trained, settings).update([_tensor((4, 8), "fp32")] * 2, [1e-3])

    return update


MAKERS = {
    "lora": _training,
    "controlnet": _training,
    "vae encode": _vae,
    "vae decode": _vae,
    "clip": _encoder,
    "t5": _encoder,
    "optimizer": _optimizer,
}
"""What makes the function that compiles a graph, by its name.  The optimizer is in float32 whatever the policy."""


if __name__ == "__main__":
    dtype, folder, attention, *names = sys.argv[1:]
    _compile_all(dtype, Path(folder), attention, names)
