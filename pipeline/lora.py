"""LoRA (arXiv:2106.09685) on the FLUX.1 transformer: injecting, initialising, saving, loading."""

import json
from pathlib import Path

import numpy as np

from cache import write_tensors
from pipeline import draws, models
from pipeline.errors import UserError
from pipeline.experiment import LORA_TARGETS, Lora
from pipeline.precision import Policy

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "init_lora_weights", "use_dora")
ADAPTER_SETTINGS += ("use_rslora", "rank_pattern", "alpha_pattern", "peft_type")
"""What the saved file says of the adapter: readers pass all of it to their LoraConfig, and every PEFT knows these."""


def inject(transformer, settings: Lora, policy: Policy, seed: int) -> list:
    """Add LoRA layers to the frozen ``transformer``; returns the parameters to train.

    As in the reference implementation's "gaussian" scheme, A is normal with deviation 1/rank and B is zero, so that the
    model starts out unchanged.  A comes from ``seed`` alone.  Raises UserError where a target matches no module.
    """
    from mindone.peft import LoraConfig

    targets = _targets(transformer, settings)
    alpha = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha
    transformer.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    )
    _use_precision(transformer, policy)
    trained = transformer.trainable_params()
    for index, parameter in enumerate(trained):
        if "lora_A" in parameter.name:
            values = draws.normal(seed, draws.Purpose.LORA_INIT, index, parameter.shape) / np.float32(settings.rank)
            set_values(parameter, values)
    return trained


def _targets(transformer, settings: Lora) -> list[str]:
    wanted = LORA_TARGETS.get(settings.targets, settings.targets)
    if isinstance(wanted, str):
        raise UserError(
            f"lora.targets: no preset {wanted!r}; known: {', '.join(LORA_TARGETS)}; or give a list of module names"
        )
    for target in wanted:
        _check_target(transformer, target)
    return list(wanted)


def _check_target(transformer, target: str) -> None:
    """Raise UserError unless the modules named ``target`` exist and all are linear layers."""
    from mindspore import mint

    cells = [cell for name, cell in transformer.cells_and_names() if name == target or name.endswith(f".{target}")]
    if not cells:
        raise UserError(f"lora.targets: no module of the transformer is named {target}")
    wrong = {type(cell).__name__ for cell in cells if not isinstance(cell, mint.nn.Linear)}
    if wrong:
        found = " and ".join(sorted(wrong))
        raise UserError(f"lora.targets: {target} is a {found}, expected linear layers such as to_q or to_out.0")


def _use_precision(transformer, policy: Policy) -> None:
    """Trained parameters in their dtype, the LoRA layers' arithmetic in theirs; the frozen rest stays as loaded."""
    from mindone.diffusers.training_utils import cast_training_params
    from mindone.peft.tuners.tuners_utils import BaseTunerLayer

    cast_training_params(transformer, models.mindspore_dtype(policy.params))
    if policy.compute == policy.params:
        return
    for _, cell in transformer.cells_and_names():
        if isinstance(cell, BaseTunerLayer):
            for name in cell.adapter_layer_names:
                layer = getattr(cell, name)
                if ADAPTER in layer:
                    layer[ADAPTER].to_float(models.mindspore_dtype(policy.compute))


def set_values(parameter, values: np.ndarray) -> None:
    import mindspore as ms

    parameter.set_data(ms.Tensor(np.asarray(values, np.float32)).astype(parameter.dtype))


def values(trained: list) -> dict[str, np.ndarray]:
    """The trained parameters under diffusers' keys, such as ``transformer.x_embedder.lora_A.weight``."""
    return {_diffusers_key(parameter.name): parameter.asnumpy() for parameter in trained}


def _diffusers_key(name: str) -> str:
    return "transformer." + name.replace(f".{ADAPTER}.", ".")


def save(folder: Path, transformer, trained: list, metadata: dict[str, str]) -> Path:
    """Write the LoRA as diffusers and others load it, atomically.

    The adapter's settings go into the file's metadata, where diffusers looks for them: without them a reader takes
    alpha to be the rank.
    """
    config = transformer.peft_config[ADAPTER].to_dict()
    adapter = {f"transformer.{key}": config[key] for key in ADAPTER_SETTINGS}
    notes = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True, default=sorted)}
    path, arrays = folder / WEIGHTS_NAME, dict(sorted(values(trained).items()))
    shapes = {key: (array.dtype.name, array.shape) for key, array in arrays.items()}
    write_tensors(path, shapes, arrays.values(), notes | metadata)
    return path


def load(trained: list, path: Path) -> None:
    """Set injected LoRA parameters from a saved file.  Raises UserError where names or shapes differ."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}; train again") from None
    expected = {_diffusers_key(parameter.name): parameter for parameter in trained}
    wrong = sorted(expected.keys() ^ saved.keys())
    wrong += [key for key in expected.keys() & saved.keys() if tuple(expected[key].shape) != saved[key].shape]
    if wrong:
        raise UserError(f"{path}: does not fit this transformer and these targets: {', '.join(wrong[:5])}")
    for key, parameter in expected.items():
        set_values(parameter, saved[key])
