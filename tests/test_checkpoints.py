import shutil
import socket
from pathlib import Path

import pytest
from model_files import COMPONENTS, STEMS, each_component, edit_config, shard, single_file

from cache import FileFacts
from pipeline.errors import UserError
from pipeline.flux import pretrained

pytestmark = pytest.mark.usefixtures("cpu")


# --- where checkpoints are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no such folder"),
        (Path.mkdir, "not a FLUX.1 model in diffusers layout: no model_index.json"),
        (Path.touch, "a single file; name it by .model. transformer"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, make, message):
    make(tmp_path / "none")
    with pytest.raises(UserError, match=message):
        pretrained.local_folder(tmp_path / "none")


def test_a_local_checkpoint_is_used_where_it_is(tiny_model):
    assert pretrained.local_folder(tiny_model) == tiny_model


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache, and no network."""
    from huggingface_hub import constants

    def connect(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["owner/name", "owner/my flux", "../name", "owner/..", "owner/a--b"])
def test_a_hub_id_that_was_not_downloaded_is_refused_without_network(hub_cache, name):
    with pytest.raises(UserError) as error:
        pretrained.local_folder(name)
    assert str(error.value).startswith(f"{name}: neither a local folder nor downloaded from the Hub yet")


def downloaded(tiny_model, hub_cache, commit="0123456789abcdef0123456789abcdef01234567"):
    """The tiny checkpoint as the Hub's client keeps a download of it."""
    repository = hub_cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(tiny_model, repository / "snapshots" / commit))


def test_a_downloaded_hub_id_is_found_without_network(hub_cache, tiny_model):
    folder = downloaded(tiny_model, hub_cache)
    assert pretrained.local_folder("owner/name") == folder
    assert pretrained.local_folder("owner/name", revision=folder.name) == folder
    with pytest.raises(UserError, match="nor downloaded"):
        pretrained.local_folder("owner/name", revision="other")
    with pytest.raises(UserError, match="check \\[model\\] variant"):
        pretrained.local_folder("owner/name", variant="fp16")


@pytest.mark.parametrize(
    "gone",
    ["vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors", "transformer/config.json"]
    + ["tokenizer_2/tokenizer_config.json", "scheduler/scheduler_config.json"],
)
def test_a_download_that_was_cut_short_does_not_pass_for_a_checkpoint(hub_cache, tiny_model, gone):
    folder = downloaded(tiny_model, hub_cache)
    (folder / gone).unlink()
    with pytest.raises(UserError) as error:
        pretrained.local_folder("owner/name")
    assert str(error.value).startswith(f"{folder / gone}: missing")


def test_a_download_never_asks_for_pickles_or_code():
    from huggingface_hub.utils import filter_repo_objects

    wanted = [f"{part}/config.json" for part in COMPONENTS]
    wanted += ["model_index.json", "scheduler/scheduler_config.json"]
    wanted += ["tokenizer/merges.txt", "tokenizer_2/spiece.model"]
    wanted += ["vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model-00001-of-00002.safetensors"]
    wanted += ["text_encoder_2/model.safetensors.index.json"]
    wanted += ["transformer/diffusion_pytorch_model-00003-of-00003.safetensors"]
    unwanted = ["flux1-dev.safetensors", "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.ckpt", "run.py"]
    unwanted += ["vae/diffusion_pytorch_model.fp16.safetensors"]
    unwanted += ["text_encoder/flax_model.msgpack", "transformer/model.py"]
    found = filter_repo_objects(wanted + unwanted, allow_patterns=pretrained._patterns(""))
    assert sorted(found) == sorted(wanted)


# --- digests ------------------------------------------------------------------------------------------------------


def digests(folder, tmp_path):
    facts = FileFacts(tmp_path / "facts.sqlite")
    found = {component: pretrained.component_digest(folder, component, facts) for component in COMPONENTS}
    return found | {name: pretrained.tokenizer_digest(folder, name, facts) for name in ("tokenizer", "tokenizer_2")}


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


@each_component
def test_one_byte_of_weights_changes_the_digest_of_its_component_alone(checkpoint, tmp_path, component):
    before = digests(checkpoint, tmp_path)
    path = single_file(checkpoint, component)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    after = digests(checkpoint, tmp_path)
    assert changed(before, after) == {component}
    assert before[component]["config"] == after[component]["config"]


@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2"])
def test_one_byte_of_a_tokenizer_changes_its_digest_alone(checkpoint, tmp_path, component):
    before = digests(checkpoint, tmp_path)
    path = checkpoint / component / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert changed(before, digests(checkpoint, tmp_path)) == {component}


@each_component
def test_a_byte_of_any_shard_changes_the_digest(checkpoint, tmp_path, component):
    index = shard(checkpoint, component)
    single_file(checkpoint, component).unlink()
    seen = [digests(checkpoint, tmp_path)]
    for number in (1, 2):
        path = index.with_name(f"{STEMS[component]}-0000{number}-of-00002.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        seen.append(digests(checkpoint, tmp_path))
        assert changed(*seen[-2:]) == {component}


@each_component
def test_where_a_checkpoint_comes_from_changes_no_digest(checkpoint, tmp_path, component):
    before = digests(checkpoint, tmp_path)
    edit_config(checkpoint, component, _name_or_path="elsewhere")
    edit_config(checkpoint, component, transformers_version="5.0.0", _diffusers_version="1.0.0")
    edit_config(checkpoint, component, torch_dtype="bfloat16", dtype="bfloat16", _commit_hash="abc")
    assert digests(checkpoint, tmp_path) == before


@pytest.mark.parametrize(
    "component, settings",
    [
        ("text_encoder", {"hidden_act": "gelu"}),
        ("text_encoder_2", {"relative_attention_max_distance": 64}),
        ("vae", {"norm_num_groups": 4}),
        ("transformer", {"axes_dims_rope": [8, 12, 12]}),
    ],
)
def test_a_config_field_that_a_model_computes_with_changes_its_digest_alone(checkpoint, tmp_path, component, settings):
    before = digests(checkpoint, tmp_path)
    edit_config(checkpoint, component, **settings)
    after = digests(checkpoint, tmp_path)
    assert changed(before, after) == {component}
    assert before[component]["weights"] == after[component]["weights"]


def test_a_moved_checkpoint_has_the_same_digests(checkpoint, tmp_path):
    before = digests(checkpoint, tmp_path)
    assert digests(checkpoint.rename(tmp_path / "moved"), tmp_path) == before


def test_a_tokenizer_without_files_is_refused(checkpoint, tmp_path):
    shutil.rmtree(checkpoint / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer files"):
        digests(checkpoint, tmp_path)
