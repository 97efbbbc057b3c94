"""A pretrained FLUX.1 on disk, in diffusers layout: where it is, whether it is whole, and what identifies it.

Imports no MindSpore, so that the scheduler can ask; safetensors only.  Raises UserError for what a user can put right.
"""

from pathlib import Path

from cache import canonical, digest, load_json
from cache.terminal.words import human_bytes
from pipeline.errors import UserError
from pipeline.flux import model_configs
from pipeline.flux.model_configs import CONFIGS, class_of
from pipeline.process.progress import busy

PUBLISHED_CONFIGS = Path(__file__).with_name("configs")
"""Configs of the published models, a folder each in diffusers' layout."""

COMPONENTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "transformer", "scheduler")
WEIGHTS = {"text_encoder": "model", "text_encoder_2": "model", "vae": "diffusion_pytorch_model"}
WEIGHTS["transformer"] = "diffusion_pytorch_model"
CONTROLNET = "controlnet"
"""No part of a pretrained model: its folder is its own."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
CONFIG_NAMES = dict.fromkeys(TOKENIZERS, "tokenizer_config.json")
CONFIG_NAMES["scheduler"] = "scheduler_config.json"
QUICK_BYTES = 1 << 30
"""Weights that are read in passing for their digests; more than that is read by GetModel, which says so."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONFIG_NOTES = ("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version", "torch_dtype", "dtype")
"""Config fields that say where a model came from and change nothing of what it computes."""


def local_folder(path: Path | str, revision: str = "", variant: str = "", transformer: Path | None = None) -> Path:
    """The model's folder on this machine.  A Hub id is looked up among what has been downloaded.

    transformer: a file or folder whose weights stand for those in the model's folder; as of `weight_files`.

    Raises UserError where there is none, or where its download was cut short.
    """
    if isinstance(path, Path):
        if (path / "model_index.json").is_file():
            return _whole(path, variant, transformer)
        raise UserError(
            f"{path}: {_what_is_there(path)}; check [model] path: a folder in diffusers layout, or a Hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(
            f"{path}: neither a local folder nor downloaded from the Hub yet; run GetModel, or check [model] path"
        ) from None
    return _whole(folder, variant, transformer)


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "no such folder"
    if path.is_file():
        return "a single file; name it by [model] transformer, and by path the folder that has the other components"
    return "not a FLUX.1 model in diffusers layout: no model_index.json in it"


def download(repository: str, revision: str = "", variant: str = "", transformer: Path | None = None) -> Path:
    """Fetch configs, tokenizers and safetensors of a Hub repository; what is there already is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=_patterns(variant, transformer))
        )
    except GatedRepoError:
        raise UserError(f"{repository}: gated; accept its licence on the Hub and log in with `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{repository}: no such repository on the Hub, and no such folder beside the experiment file; "
            "check [model] path"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{repository}: no such folder beside the experiment file, and its download from the Hub failed: "
            f"{one_line(error)}; check [model] path, or run again to go on"
        ) from None
    return _whole(folder, variant, transformer)


def pipeline_class(folder: Path) -> str:
    """The class of the model's pipeline in diffusers; "" where there is no index, as in a folder of configs."""
    path = folder / "model_index.json"
    return str(_json(path).get("_class_name", "")) if path.is_file() else ""


def hub_folder() -> Path:
    """Where the Hub's client keeps what it has downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _whole(folder: Path, variant: str, transformer: Path | None) -> Path:
    """The folder, unless one of its parts is missing or of another kind: the Hub's cache also shows unfinished ones."""
    configs = {component: checked_config(folder, component) for component in COMPONENTS}
    if misfits := model_configs.misfits(configs):
        raise UserError(f"{folder / 'transformer' / 'config.json'}: {'; '.join(misfits)}; parts of different models")
    for component in WEIGHTS:
        weight_files(folder, component, variant, transformer)
    if transformer is not None and (own := transformer / "config.json").is_file():
        if _working(_json(own)) != working_config(folder, "transformer"):
            raise UserError(f"{own}: differs from {folder / 'transformer' / 'config.json'}; check [model] transformer")
    return folder


def _check_config(path: Path, component: str, settings: dict) -> None:
    expected, found = CONFIGS[component][0], class_of(settings)
    if found != expected and component != "scheduler":
        raise UserError(f"{path}: class {found}, expected {expected}; not a FLUX.1 model")
    if problems := model_configs.problems(component, settings):
        raise UserError(f"{path}: {'; '.join(problems)}; no model can be made of it")


def _patterns(variant: str, transformer: Path | None = None) -> list[str]:
    """Configs, tokenizers, and the wanted weights; never pickles, other frameworks' weights, or code."""
    wanted = {part: stem for part, stem in WEIGHTS.items() if part != "transformer" or transformer is None}
    suffix = f".{variant}" if variant else ""
    tails = (f"{suffix}.safetensors", f"{suffix}-*-of-*.safetensors")
    weights = [f"{part}/{stem}{tail}" for part, stem in wanted.items() for tail in tails]
    configs = ["model_index.json", *(f"{part}/*.json" for part in COMPONENTS)]
    return [*configs, "tokenizer*/*.txt", "tokenizer*/*.model", *weights]


def part_of(folder: Path, component: str) -> Path:
    """The folder of a model's component."""
    return folder if component == CONTROLNET else folder / component


def checked_config(folder: Path, component: str) -> dict:
    """As `config`.  Raises UserError where it is of another model, or of none that can be made."""
    settings = config(folder, component)
    if component in CONFIGS:
        _check_config(_config_path(folder, component), component, settings)
    return settings


def checked_config_of(part: Path, component: str) -> dict:
    """The same of a component's own folder."""
    settings = _json(part / CONFIG_NAMES.get(component, "config.json"))
    _check_config(part / "config.json", component, settings)
    return settings


def config(folder: Path, component: str) -> dict:
    return _json(_config_path(folder, component))


def _config_path(folder: Path, component: str) -> Path:
    return part_of(folder, component) / CONFIG_NAMES.get(component, "config.json")


def _json(path: Path) -> dict:
    try:
        document = load_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the model is incomplete") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: found a {type(document).__name__}, expected a JSON object; the model is damaged")
    return document


def weight_files(folder: Path, component: str, variant: str = "", transformer: Path | None = None) -> list[Path]:
    """The safetensors files of a component: one, or the shards that its index lists.

    transformer: where the transformer's are instead: a file of any layout of `single_file`, or a folder like the
    model's own.  Raises UserError where a file is missing, leaves the folder, or where there are pickles only.
    """
    if component == "transformer" and transformer is not None:
        return _of_transformer(transformer)
    return _files_in(part_of(folder, component), component, variant)


def _of_transformer(path: Path) -> list[Path]:
    if path.is_dir():
        return _files_in(path, "transformer", "")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check [model] transformer")
    if path.suffix in PICKLES:
        raise UserError(f"{path}: pickled weights, which can run code when loaded and are refused; name safetensors")
    return [path]


def _files_in(part: Path, component: str, variant: str) -> list[Path]:
    stem = WEIGHTS.get(component, "diffusion_pytorch_model")
    suffix = f".{variant}" if variant else ""
    single = part / f"{stem}{suffix}.safetensors"
    indices = (part / f"{stem}.safetensors.index{suffix}.json", part / f"{stem}{suffix}.safetensors.index.json")
    index = next((path for path in indices if path.is_file()), None)
    # Where both are, the text encoders' loader takes the single file, the others' the shards.
    if single.is_file() and (index is None or component.startswith("text_encoder")):
        return [single]
    if index is not None:
        return _shards(part, index)
    pickles = sorted(path.name for path in part.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{part}: only pickled weights ({', '.join(pickles)}), which can run code when loaded and are refused; "
            "convert them to safetensors"
        )
    available = sorted(path.name for path in part.glob("*.safetensors"))
    hint = f"; there are {', '.join(available)}: check [model] variant" if available else ""
    raise UserError(f"{single}: missing{hint}")


def _shards(part: Path, index: Path) -> list[Path]:
    weight_map = _json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise UserError(f"{index}: lists no shards; the model is damaged")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: refuses shard {name!r}: not a safetensors file in this folder")
        if not (part / name).is_file():
            raise UserError(f"{part / name}: missing; {index.name} lists it")
    return [part / name for name in names]


def component_digest(folder: Path, component: str, facts, variant: str = "", transformer: Path | None = None) -> dict:
    """What identifies a component: digests of its weights and of the part of its config that it computes with.

    facts: cache.FileFacts, so that unchanged files are read once.
    """
    files = weight_files(folder, component, variant, transformer)
    digests = facts.file_digests(files)
    weights = [digests[path] for path in files]
    facts.file_digest(_config_path(folder, component))  # for `confirm`: the digest in the address is of its content
    return {"weights": digest(canonical(weights)), "config": digest(canonical(working_config(folder, component)))}


def confirm(folder: Path, component: str, facts, variant: str = "", transformer: Path | None = None) -> None:
    """Raise StoreError where a file of the component, or of the tokenizer, has changed since its digest was taken.

    facts: the very object that `component_digest`, or `tokenizer_digest`, was given.
    """
    if component in TOKENIZERS:
        facts.confirm(_tokenizer_files(folder / component))
    else:
        facts.confirm([*weight_files(folder, component, variant, transformer), _config_path(folder, component)])


def unread_bytes(folder: Path, facts, variant: str = "", transformer: Path | None = None) -> int:
    """How many bytes of weights must still be read before every component's digest is known."""
    files = _all_weights(folder, variant, transformer)
    known = facts.get_many(files)
    return sum(path.stat().st_size for path in files if "digest" not in known.get(path, {}))


def _all_weights(folder: Path, variant: str, transformer: Path | None) -> list[Path]:
    return [path for component in WEIGHTS for path in weight_files(folder, component, variant, transformer)]


def are_weights_known(folder: Path, facts, variant: str = "", transformer: Path | None = None) -> bool:
    """Whether the digests of all weights are known, or can be learnt in passing."""
    return unread_bytes(folder, facts, variant, transformer) < QUICK_BYTES


def read_weights(folder: Path, facts, variant: str = "", transformer: Path | None = None) -> None:
    """Learn the digest of every component's weights: once for each file, several at a time."""
    files = _all_weights(folder, variant, transformer)
    size = human_bytes(unread_bytes(folder, facts, variant, transformer))
    with busy(f"reading {size} of weights once, for their digests"):
        facts.file_digests(files)


def working_config(folder: Path, component: str) -> dict:
    """What the component computes with: not where it came from, nor what is only applied to its output later."""
    return _working(config(folder, component), ("scaling_factor", "shift_factor") if component == "vae" else ())


def _working(settings: dict, ignored: tuple[str, ...] = ()) -> dict:
    return {key: value for key, value in settings.items() if key not in (*CONFIG_NOTES, *ignored)}


def tokenizer_digest(folder: Path, component: str, facts) -> str:
    files = _tokenizer_files(folder / component)
    return digest(canonical([[path.name, facts.file_digest(path)] for path in files]))


def _tokenizer_files(part: Path) -> list[Path]:
    files = sorted(path for path in part.glob("*") if path.suffix in (".json", ".txt", ".model") and path.is_file())
    if not files:
        raise UserError(f"{part}: no tokenizer files; the model is incomplete")
    return files


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
