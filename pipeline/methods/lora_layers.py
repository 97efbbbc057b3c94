"""LoRA (arXiv:2106.09685) on the FLUX.1 transformer and on CLIP: injecting, initialising, saving, loading."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cache import opened_tensors, write_tensors
from pipeline import draws
from pipeline.devices import simulation, tensors
from pipeline.devices.precision import Policy
from pipeline.errors import UserError
from pipeline.exchange import declared
from pipeline.exchange.change import Change, Changes
from pipeline.exchange.declared import ADAPTER_METADATA
from pipeline.exchange.lora_files import WEIGHTS_NAME
from pipeline.flux import counts
from pipeline.methods.exchanged import exchanged
from pipeline.methods.lora_dropout import Dropouts
from pipeline.settings.fields import Lora
from pipeline.settings.values import LORA_TARGETS

ADAPTER = "default"
TRANSFORMER = "transformer"
"""The prefix of the transformer's keys in diffusers' LoRA files."""

TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
MODEL_DRAWS = 1 << 32
"""How far apart the draws of two models' parameters begin."""

ADAPTER_SETTINGS = (
    *("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "init_lora_weights", "use_dora"),
    *("use_rslora", "rank_pattern", "alpha_pattern", "peft_type"),
)
"""What the saved file says of an adapter: readers pass all of it to their LoraConfig, and every PEFT knows these."""


class Adapted:
    """Frozen models with LoRA layers: the transformer and, where it trains too, CLIP.

    cells: by the prefix of their diffusers keys, "transformer" and "text_encoder".  trained: the parameters to train.
    groups: of each the position of its model in ``cells``.

    As in the reference implementation's "gaussian" scheme, A is normal with deviation 1/rank and B is zero, so that the
    models start out unchanged; A comes from ``seed`` alone.  Raises UserError where a target matches no module.
    """

    def __init__(self, cells: dict, settings: Lora, policy: Policy, seed: int):
        self.cells, self.settings, self.seed = cells, settings, seed
        self.trained, self.groups, self._keys = [], [], {}
        for group, (prefix, cell) in enumerate(cells.items()):
            wanted = _targets(cell, settings) if prefix == TRANSFORMER else list(TEXT_ENCODER_TARGETS)
            for number, parameter in enumerate(_inject(cell, settings, policy, wanted)):
                if "lora_A" in parameter.name:
                    _initialise(parameter, settings.rank, seed, group * MODEL_DRAWS + number)
                self._keys[parameter.name] = f"{prefix}.{parameter.name.replace(f'.{ADAPTER}.', '.')}"
                self.trained.append(parameter)
                self.groups.append(group)

    def add_dropout(self) -> Dropouts:
        """Put dropout before the LoRA layers, where the settings ask for it."""
        layers = self._all_layers if self.settings.dropout else []
        return Dropouts(layers, ADAPTER, self.settings.dropout, self.seed)

    def first_layer(self):
        """lora_B of the first adapted linear layer."""
        return _layers(next(iter(self.cells.values())))[0].lora_B[ADAPTER]

    def save(self, folder: Path, result: Mapping, metadata: dict[str, str]) -> Path:
        """Write the LoRA as diffusers and others load it, atomically.  result: its parameters by name.

        The file declares lora_alpha = r, and alpha / rank is multiplied into lora_B: ComfyUI does not read what a file
        declares and takes lora_B @ lora_A as it is.  The rank and alpha asked for are in the file's metadata as "lora".
        """
        adapters: dict[str, object] = {}
        for prefix, cell in self.cells.items():
            config = cell.peft_config[ADAPTER].to_dict()
            config["lora_alpha"] = config["r"]
            adapters |= {f"{prefix}.{key}": config[key] for key in ADAPTER_SETTINGS}
        notes = {
            "format": "pt",
            "lora": json.dumps({"rank": self.settings.rank, "alpha": self.settings.alpha}),
            ADAPTER_METADATA: json.dumps(adapters, indent=2, sort_keys=True, default=sorted),
        }
        path, arrays = folder / WEIGHTS_NAME, dict(sorted(self.values(result).items()))
        shapes = {key: (array.dtype.name, array.shape) for key, array in arrays.items()}
        write_tensors(path, shapes, arrays.values(), notes | metadata)
        return path

    def values(self, result: Mapping) -> dict[str, np.ndarray]:
        """Trained parameters, given by name, under diffusers' keys, as ``transformer.x_embedder.lora_A.weight``.

        lora_B is multiplied by the scale of its layer, so that lora_B @ lora_A is what is added to the layer's weight.
        """
        scales = self._scales
        found = {self._keys[name]: parameter.asnumpy() for name, parameter in result.items()}
        for key in found:
            if "lora_B" in key:
                found[key] = found[key] * np.float32(scales[key.partition(".")[0]])
        return found

    def begin_from(self, changes: Changes) -> None:
        """Set the parameters so that at first the LoRA changes the layers that ``changes`` has as it says.

        The other layers begin as they do without; alpha / rank is that of the settings.
        """
        named = {self._keys[parameter.name]: parameter for parameter in self.trained}
        scale = self.settings.alpha / self.settings.rank
        for component, layers in changes.items():
            for layer, change in layers.items():
                down, up = (named[f"{component}.{layer}.lora_{way}.weight"] for way in "AB")
                for parameter, values in zip((down, up), _first_values(change, down.asnumpy(), scale)):
                    set_values(parameter, values)

    def load(self, path: Path) -> None:
        """Set the LoRA's parameters and its scale to those of a saved file, whatever alpha the settings ask for.

        Raises UserError where names or shapes differ, or where the file is damaged.
        """
        for parameter, values in self._saved(path):
            set_values(parameter, values)
        self._set_scales({prefix: scale_of(path, prefix) for prefix in self.cells})

    @contextmanager
    def as_saved(self, folder: Path) -> Iterator[None]:
        """A block in which the models are as with the LoRA that is saved in ``folder``, and drop nothing."""
        path = folder / WEIGHTS_NAME
        scales, dropouts = self._scales, [layer.lora_dropout[ADAPTER] for layer in self._all_layers]
        with exchanged(self._saved(path)):
            try:
                self._set_scales({prefix: scale_of(path, prefix) for prefix in self.cells})
                self._set_dropouts([_no_dropout()] * len(dropouts))
                yield
            finally:
                self._set_scales(scales)
                self._set_dropouts(dropouts)

    @property
    def _all_layers(self) -> list:
        return [layer for cell in self.cells.values() for layer in _layers(cell)]

    @property
    def _scales(self) -> dict[str, float]:
        return {prefix: _layers(cell)[0].scaling[ADAPTER] for prefix, cell in self.cells.items()}

    def _set_scales(self, scales: Mapping[str, float]) -> None:
        for prefix, cell in self.cells.items():
            for layer in _layers(cell):
                layer.scaling[ADAPTER] = scales[prefix]

    def _set_dropouts(self, dropouts: Sequence) -> None:
        for layer, dropout in zip(self._all_layers, dropouts):
            layer.lora_dropout[ADAPTER] = dropout

    def _saved(self, path: Path) -> list[tuple[Any, np.ndarray]]:
        """The parameters with what a saved file has for them.  Raises UserError where it is of others."""
        with _opened(path) as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}
        expected = {self._keys[parameter.name]: parameter for parameter in self.trained}
        wrong = sorted(expected.keys() ^ saved.keys())
        wrong += [key for key in expected.keys() & saved.keys() if tuple(expected[key].shape) != saved[key].shape]
        if wrong:
            raise UserError(f"{path}: does not fit this model and these targets: {', '.join(wrong[:5])}")
        return [(parameter, saved[key]) for key, parameter in expected.items()]


def _first_values(change: Change, down: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """lora_A and lora_B of a layer that at first changes its weight as ``change`` does.

    down: what lora_A would begin with otherwise, (rank, inputs): its last rows stay where the change has a lower rank,
    with zeros in lora_B.  scale: alpha / rank of the training.
    """
    up = np.zeros((change.up.shape[0], len(down)), np.float32)
    up[:, : change.rank] = change.up / np.float32(scale)
    return np.concatenate([change.down, down[change.rank :]]).astype(np.float32), up


def scale_of(path: Path, prefix: str = TRANSFORMER) -> float:
    """What a saved file's lora_B @ lora_A is multiplied by in a model: lora_alpha / r, as the file declares them.

    It is 1 in what `Adapted.save` writes; files of older versions declare the alpha that was asked for.  A file that
    declares nothing has 1 too, as in diffusers and ComfyUI.  Imports no MindSpore.  Raises UserError where the file
    cannot be read or its declaration is damaged.
    """
    with _opened(path) as file:
        text = (file.metadata() or {}).get(ADAPTER_METADATA)
    try:
        return declared.scale(text, prefix)
    except ValueError as error:
        raise UserError(f"{path}: its metadata is damaged: {error}; remove the file and run TrainLoRA again") from None


@contextmanager
def _opened(path: Path) -> Iterator:
    """A safetensors file to read from.  Raises UserError where it cannot be read."""
    from safetensors import SafetensorError

    try:
        with opened_tensors(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the disk and the permissions") from None
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read: {error}; remove the file and run TrainLoRA again") from None


def inject(transformer, settings: Lora, policy: Policy, seed: int) -> list:
    """Add LoRA layers to a frozen transformer alone; returns the parameters to train."""
    return Adapted({TRANSFORMER: transformer}, settings, policy, seed).trained


def _inject(cell, settings: Lora, policy: Policy, targets: list[str]) -> list:
    """Add LoRA layers, without dropout, to a frozen model; returns the parameters to train."""
    from mindone.peft import LoraConfig

    cell.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.alpha, init_lora_weights="gaussian", target_modules=targets)
    )
    _use_precision(cell, policy)
    return cell.trainable_params()


def _layers(cell) -> list:
    """The adapted linear layers of a model."""
    from mindone.peft.tuners.tuners_utils import BaseTunerLayer

    return [each for _, each in cell.cells_and_names() if isinstance(each, BaseTunerLayer)]


def _no_dropout():
    from mindspore import nn

    return nn.Identity()


def _initialise(parameter, rank: int, seed: int, index: int) -> None:
    values = draws.normal(seed, draws.Purpose.LORA_INIT, index, parameter.shape)
    set_values(parameter, values / np.float32(rank))


def _targets(transformer, settings: Lora) -> list[str]:
    """The names of the layers to train, as PEFT takes them: endings, and in place of a pattern all that it matches."""
    return [name for target in wanted_targets(settings) for name in _matching(transformer, target)]


def wanted_targets(settings: Lora) -> tuple[str, ...]:
    """The preset's targets, or those that are listed.  Raises UserError for an unknown preset."""
    if isinstance(settings.targets, tuple | list):
        return tuple(settings.targets)
    if settings.targets not in LORA_TARGETS:
        raise UserError(
            f"lora.targets: no preset {settings.targets!r}; known: {', '.join(LORA_TARGETS)}; or give a list of "
            "module names"
        )
    return LORA_TARGETS[settings.targets]


def _matching(transformer, target: str) -> list[str]:
    """What PEFT is told of a target: the target where it is an ending of linear layers alone, else their whole names.

    As in the plan, a target means linear layers.  Raises UserError where it means none.
    """
    from mindspore import mint

    cells = {name: cell for name, cell in transformer.cells_and_names() if counts.is_meant(name, target)}
    if not cells:
        raise UserError(f"lora.targets: no module of the transformer is named {target}")
    linear = [name for name, cell in cells.items() if isinstance(cell, mint.nn.Linear)]
    if not linear:
        found = " and ".join(sorted({type(cell).__name__ for cell in cells.values()}))
        raise UserError(f"lora.targets: {target} is a {found}, expected linear layers such as to_q or to_out.0")
    return linear if counts.is_pattern(target) or len(linear) < len(cells) else [target]


def _use_precision(transformer, policy: Policy) -> None:
    """Trained parameters in their dtype, the LoRA layers' arithmetic in theirs; the frozen rest stays as loaded."""
    for parameter in transformer.trainable_params():
        parameter.set_dtype(tensors.mindspore_dtype(policy.params))
    layers = _layers(transformer)
    if policy.simulated:
        for layer in layers:
            simulation.round_output(layer.lora_B[ADAPTER])
    elif policy.compute != policy.params:
        for cell in layers:
            for name in cell.adapter_layer_names:
                layer = getattr(cell, name)
                if ADAPTER in layer:
                    layer[ADAPTER].to_float(tensors.mindspore_dtype(policy.compute))


def set_values(parameter, values: np.ndarray) -> None:
    import mindspore as ms

    parameter.set_data(ms.Tensor(np.asarray(values, np.float32)).astype(parameter.dtype))
