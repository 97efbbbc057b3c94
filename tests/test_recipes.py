import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.indexing import IndexedPhoto
from pipeline.errors import UserError
from pipeline.methods import LORA
from pipeline.plan.plan import resolve
from pipeline.settings.reading import load_experiment

ROOT = Path(__file__).parents[1]


def toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


class Project:
    """An experiment file that can be rewritten, and its own copy of the tiny checkpoint."""

    def __init__(self, folder, tiny_model):
        self.folder, self.model = folder, folder / "model"
        shutil.copytree(tiny_model, self.model)
        self.settings = {
            "seed": 1,
            "paths": {"store": "store", "runs": "runs"},
            "model": {"path": "./model"},
            "data": {"images": "photos", "resolution": 64, "max_sequence_length": 32},
        }

    def set(self, table="", **values):
        (self.settings.setdefault(table, {}) if table else self.settings).update(values)

    def plan(self):
        tables = {key: value for key, value in self.settings.items() if isinstance(value, dict)}
        lines = [f"{key} = {toml(value)}" for key, value in self.settings.items() if key not in tables]
        for table, values in tables.items():
            lines += [f"[{table}]", *(f"{key} = {toml(value)}" for key, value in values.items())]
        (self.folder / "experiment.toml").write_text("\n".join(lines))
        return resolve(load_experiment(self.folder / "experiment.toml"), LORA)

    def ids(self, photos=None):
        plan = self.plan()
        found = {name: entries.id for name, entries in entries_of(plan).items()}
        return found | {"run": plan.of(PHOTOS if photos is None else photos).run_id}


def photo(number, caption="a cat", name="a.png"):
    return IndexedPhoto(folder="/photos", name=name, caption=caption, digest=f"{number:032x}", width=64, height=64)


def entries_of(plan):
    """The entries of each kind, of an experiment in which a photo has one variant."""
    (variant,) = plan.variants(photo(1))
    return {"pooled": plan.pooled, "txt": plan.txt, "latents": plan.latents(variant)}


PHOTOS = [photo(1), photo(2, "a dog", "b.png")]


@pytest.fixture
def project(tmp_path, tiny_model):
    return Project(tmp_path, tiny_model)


def changes(project, change):
    """Which of the three recipes and the run id are others after ``change()``."""
    before = project.ids()
    change()
    after = project.ids()
    return {name for name in before if before[name] != after[name]}


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_nothing_changes_where_nothing_changed(project):
    assert changes(project, lambda: None) == set()
    assert len(set(project.ids().values())) == 4


@pytest.mark.parametrize(
    "table, values",
    [
        ("train", {"learning_rate": 3e-4}),
        ("train", {"steps": 7}),
        ("train", {"batch_size": 2}),
        ("train", {"optimizer": "adam_weight_decay"}),
        ("train", {"weight_decay": 0.5}),
        ("train", {"adam_beta1": 0.8}),
        ("train", {"guidance_scale": 1.0}),
        ("train", {"posterior": "mode"}),
        ("lora", {"rank": 8}),
        ("lora", {"alpha": 8.0}),
        ("lora", {"targets": ["to_q"]}),
        ("", {"seed": 2}),
        ("precision", {"transformer": {"params": "fp16", "compute": "fp16"}}),
        ("precision", {"trained": {"compute": "fp16"}}),
    ],
)
def test_a_setting_of_the_training_changes_the_run_and_no_recipe(project, table, values):
    assert changes(project, lambda: project.set(table, **values)) == {"run"}


@pytest.mark.parametrize(
    "table, values", [("train", {"log_every": 5}), ("paths", {"store": "elsewhere", "runs": "other"})]
)
def test_a_setting_that_decides_no_weight_changes_nothing(project, table, values):
    assert changes(project, lambda: project.set(table, **values)) == set()


def test_the_name_of_the_experiment_is_in_the_folder_of_the_run_but_not_in_its_id(project):
    assert changes(project, lambda: project.set(name="cat")) == set()
    assert project.plan().of(PHOTOS).run.path == project.folder / "runs" / f"cat-{project.ids()['run'][:12]}"


@pytest.mark.parametrize(
    "values, changed",
    [({"resolution": 128}, "latents"), ({"max_sequence_length": 64}, "txt")],
)
def test_a_setting_of_the_encoding_changes_its_recipe_and_the_run_alone(project, values, changed):
    assert changes(project, lambda: project.set("data", **values)) == {changed, "run"}


@pytest.mark.parametrize(
    "component, changed",
    [("text_encoder", "pooled"), ("text_encoder_2", "txt"), ("vae", "latents")],
)
@pytest.mark.parametrize("settings", [{"params": "fp16", "compute": "fp16"}, {"storage": "bf16"}])
def test_the_precision_of_an_encoder_changes_its_recipe_and_the_run_alone(project, component, changed, settings):
    assert changes(project, lambda: project.set("precision", **{component: settings})) == {changed, "run"}


@pytest.mark.parametrize(
    "file, changed",
    [
        ("text_encoder/model.safetensors", {"pooled", "run"}),
        ("text_encoder_2/model.safetensors", {"txt", "run"}),
        ("vae/diffusion_pytorch_model.safetensors", {"latents", "run"}),
        ("transformer/diffusion_pytorch_model.safetensors", {"run"}),
    ],
)
def test_one_byte_of_weights_changes_what_is_computed_with_them_and_nothing_else(project, file, changed):
    assert changes(project, lambda: flip_last_byte(project.model / file)) == changed


@pytest.mark.parametrize("component, changed", [("tokenizer", "pooled"), ("tokenizer_2", "txt")])
def test_another_tokenizer_changes_the_recipe_of_its_encoder_alone(project, component, changed):
    path = project.model / component / "tokenizer.json"
    assert changes(project, lambda: path.write_text(path.read_text() + "\n")) == {changed, "run"}


@pytest.mark.parametrize(
    "file, settings, changed",
    [
        ("text_encoder/config.json", {"hidden_act": "gelu"}, {"pooled", "run"}),
        ("vae/config.json", {"norm_num_groups": 4}, {"latents", "run"}),
        ("transformer/config.json", {"axes_dims_rope": [8, 12, 12]}, {"run"}),
        ("scheduler/scheduler_config.json", {"shift": 2.0}, {"run"}),
        ("vae/config.json", {"_name_or_path": "elsewhere"}, set()),
        ("model_index.json", {"_name_or_path": "elsewhere"}, set()),
    ],
)
def test_a_field_of_a_config_changes_what_is_computed_with_it(project, file, settings, changed):
    path = project.model / file
    assert changes(project, lambda: path.write_text(json.dumps(json.loads(path.read_text()) | settings))) == changed


def test_moving_the_checkpoint_or_the_whole_project_changes_nothing(project, tmp_path):
    def move():
        project.model.rename(project.folder / "moved")
        project.set("model", path="./moved")
        project.folder = project.folder.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))

    assert changes(project, move) == set()


def test_the_run_depends_on_the_bytes_and_captions_of_its_photos_and_not_on_their_names(project):
    plan = project.plan()
    before = plan.of(PHOTOS).run_id
    assert plan.of([photo(1, name="renamed.png"), photo(2, "a dog", "sub/b.png")]).run_id == before
    others = [[photo(1)], [photo(1), photo(3, "a dog")], [photo(1, "a cow"), photo(2, "a dog")]]
    others += [[photo(1, "a dog"), photo(2)], PHOTOS[::-1], PHOTOS + [photo(4)]]
    assert len({before, *(plan.of(each).run_id for each in others)}) == 7


def test_shapes_of_the_entries_are_those_of_the_models(project):
    plan = project.plan()
    latents = entries_of(plan)["latents"]
    assert tuple(plan.pooled.shape) == (64,)
    assert tuple(plan.txt.shape) == (32, 96)
    assert tuple(latents.shape) == (32, 8, 8)
    assert {entries.dtype for entries in entries_of(plan).values()} == {"float32"}
    assert (plan.pooled.recipe["max_length"], plan.txt.recipe["max_length"]) == (77, 32)
    assert (latents.recipe["width"], latents.recipe["height"]) == (64, 64)


def test_no_path_or_file_name_is_in_a_recipe(project):
    plan = project.plan()
    for entries in entries_of(plan).values():
        text = json.dumps(entries.recipe)
        assert str(project.folder) not in text and "safetensors" not in text and "/" not in text


def test_a_dtype_that_the_device_cannot_compute_is_refused_before_anything_is_read(project):
    project.set("precision", preset="bf16")
    project.set("device", target="CPU")
    shutil.rmtree(project.model)
    with pytest.raises(UserError, match="CPU does not compute bf16"):
        project.plan()


def test_a_checkpoint_that_is_not_there_is_refused(project):
    shutil.rmtree(project.model)
    with pytest.raises(UserError, match="no such folder"):
        project.plan()


def test_addresses_are_worked_out_without_mindspore(project):
    expected = project.ids([])
    code = """if True:
        import sys
        from pipeline.settings import reading as experiment
        from pipeline.methods import LORA
        from pipeline.plan.plan import resolve
        plan = resolve(experiment.load_experiment(sys.argv[1]), LORA).of([])
        from pipeline.data.variants import Variant
        print(plan.pooled.id, plan.txt.id, plan.latents(Variant(64, 64)).id, plan.run_id)
        print([name for name in ("mindspore", "mindone", "transformers", "diffusers", "torch") if name in sys.modules])
    """
    command = [sys.executable, "-c", code, str(project.folder / "experiment.toml")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines() == [" ".join(expected.values()), "[]"], ran.stderr
