import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.flux import model_configs
from pipeline.settings.described import as_markdown, json_schema
from pipeline.settings.experiment import EMBEDDED, Experiment
from pipeline.settings.fields import Settings
from pipeline.settings.reading import DEFAULT, load_experiment
from pipeline.settings.schema import adapter, checked


def written(folder, text):
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder, text):
    return load_experiment(written(folder, text))


def problems(folder, text):
    """The lines of the refusal below its heading, without their indent."""
    with pytest.raises(UserError) as refusal:
        loaded(folder, text)
    heading, *lines = str(refusal.value).split("\n")
    noun = "problem" if len(lines) == 1 else "problems"
    assert heading == f"{folder / 'my.toml'}: {len(lines)} {noun} in the experiment file"
    return [line.strip() for line in lines]


def test_every_problem_of_a_file_is_reported_at_once_with_its_field(tmp_path):
    found = problems(
        tmp_path,
        """
        name = "a/b"
        seed = -1
        sead = 3
        device = "CPU"
        [data]
        resolution = 500
        imges = "photos"
        [train]
        steps = true
        learning_rate = nan
        optimizer = "sgd"
        [precision.vae]
        params = "fp8"
        """,
    )
    fields = [line.partition(": ")[0] for line in found]
    assert sorted(fields) == sorted(
        "name seed sead device data.resolution data.imges train.steps train.learning_rate train.optimizer "
        "precision.vae.params".split()
    )


def test_a_misspelt_field_is_told_what_may_have_been_meant(tmp_path):
    (line,) = problems(tmp_path, "[data]\nresolutoin = 64")
    assert line.endswith("; did you mean resolution?")
    assert "did you mean" not in problems(tmp_path, "[data]\nxyz = 64")[0]


@pytest.mark.parametrize(
    "text, meant",
    [
        ("[data]\nstrict = ['cut-by-t6']", "cut-by-t5"),
        ("[data]\nstrict = ['captions cut by T5']", "cut-by-t5"),  # as its table says
        ("[device]\ntarget = 'cpu'", "CPU"),
        ("[lora]\ntargets = 'all_linear'", "all-linear"),
    ],
)
def test_a_misspelt_value_is_told_what_may_have_been_meant(tmp_path, text, meant):
    (line,) = problems(tmp_path, text)
    assert line.endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    "text, field, said",
    [
        ("sead = 3", "sead", "unknown field; did you mean seed?"),
        ("folder = 'x'", "folder", "unknown field"),
        ("[train]\nlr = 1", "train.lr", "unknown field; known here: steps, epochs"),
        ("[precision.vae]\ndtype = 'fp32'", "precision.vae.dtype", "unknown field; known here: params"),
        (
            "[precision.vae]\nparams = ['fp32']",
            "precision.vae.params",
            "must be one of bf16, fp16, fp32, found [",
        ),
        ("[precision]\nvae = 'fp32'", "precision.vae", "must be a table"),
        ("train = 3", "train", "must be a table, [train]"),
        ("[[train]]\nsteps = 1", "train", "must be a table, [train]"),
        ("[train]\nsteps = true", "train.steps", "must be a whole number, found True"),
        ("[train]\nsteps = 1.0", "train.steps", "must be a whole number, found 1.0"),
        ("[train]\nsteps = '5'", "train.steps", "must be a whole number, found '5'"),
        ("[train]\nsteps = 0", "train.steps", "must be at least 1, found 0"),
        ("[lora]\nalpha = true", "lora.alpha", "must be a number, found True"),
        ("[lora]\nalpha = 0", "lora.alpha", "must be above 0, found 0"),
        ("[lora]\ntargets = []", "lora.targets", "must be a list of at least 1, found []"),
        ("[lora]\ntargets = ['to_q', 3]", "lora.targets[1]", "must be a text, found 3"),
        ("[train]\nadam_beta2 = 1", "train.adam_beta2", "must be below 1, found 1"),
        ("[train]\nadam_beta2 = -0.1", "train.adam_beta2", "must be at least 0, found -0.1"),
        ("[train]\nlearning_rate = nan", "train.learning_rate", "must be finite, found nan"),
        ("[train]\nlearning_rate = inf", "train.learning_rate", "must be finite, found inf"),
        ("[train]\nguidance_scale = -inf", "train.guidance_scale", "must be finite, found -inf"),
        ("[train]\nweight_decay = 1e999", "train.weight_decay", "must be finite, found inf"),
        (f"[train]\nlearning_rate = {'9' * 400}", "train.learning_rate", "must be finite"),
        ("[train]\nlr_warmup_steps = 5", "train.lr_warmup_steps", "constant has none; set train.lr_scheduler"),
        ("[train]\nlr_scheduler = 'polynomial'\nlearning_rate = 1e-7", "train.learning_rate", "polynomial ends at"),
        ("[train]\noptimizer = 'sgd'", "train.optimizer", "must be one of adamw, adam_weight_decay, found 'sgd'"),
        ("[data]\nresolution = 24", "data.resolution", "must be a multiple of 16, found 24"),
        ("[data]\nresolution = [64, 24]", "data.resolution[1]", "must be a multiple of 16, found 24"),
        ("[data]\nresolution = [512, 0]", "data.resolution[1]", "must be at least 16, found 0"),
        ("[data]\nresolution = [64, 512, 64]", "data.resolution", "names 64 twice"),
        ("[data]\nresolution = []", "data.resolution", "must be a list of at least 1, found []"),
        ("[data]\nresolution = [64, true]", "data.resolution[1]", "must be a whole number, found True"),
        ("[data]\nresolution = 512.0", "data.resolution", "must be a whole number, found 512.0"),
        ("[data]\nresolution = true", "data.resolution", "must be a whole number, found True"),
        ("[data]\ncrops = -1", "data.crops", "must be at least 0, found -1"),
        ("[data]\ncrops = true", "data.crops", "must be a whole number, found True"),
        ("[data]\nflip = 1", "data.flip", "must be true or false, found 1"),
        ("[data]\nbuckets = 'yes'", "data.buckets", "must be true or false, found 'yes'"),
        ("[data]\nrepeats = 100_001", "data.repeats", "must be at most 100000, found 100001"),
        ("[data]\nresolution = [512, 81920]", "data.resolution[1]", "must be at most 8192, found 81920"),
        ("[data]\ncrops = 10_000_000", "data.crops", "must be at most 1000"),
        ("[data]\nmax_sequence_length = 1_000_000", "data.max_sequence_length", "must be at most 4096"),
        ("[train]\nbatch_size = 9_000_000_000", "train.batch_size", "must be at most 65536"),
        ("[train]\naccumulate = 9_000_000_000", "train.accumulate", "must be at most 65536"),
        (f"name = '{'字' * 34}'", "name", "must be a plain name"),
        ("[data]\nrepeats = 0", "data.repeats", "must be at least 1, found 0"),
        ("[device]\ntarget = 'cpu'", "device.target", "must be one of auto, Ascend, CPU, found 'cpu'"),
        ("[data]\nstrict = 'twice'", "data.strict", "must be true, false or a list such as ["),
        ("[data]\nstrict = ['twice', 'twice']", "data.strict", "names 'twice' twice"),
        ("[data]\nstrict = [3]", "data.strict[0]", "must be one of cut-by-clip, cut-by-t5, "),
        ("[train]\nadam_epsilon = 1e-300", "train.adam_epsilon", "must be at least 1e-30"),
        ("[train]\nlearning_rate = 1001", "train.learning_rate", "must be at most 1000"),
        ("[sample]\nprompts = ['a', 3]", "sample.prompts[1]", "must be a text, found 3"),
        ("[sample]\nprompts = 'a'", "sample.prompts", "must be a list, found 'a'"),
        ("[model]\npath = 3", "model.path", "must be a text, found 3"),
        ('[paths]\nstore = "a\\u0000b"', "paths.store", "must not hold a null character"),
        ('[paths]\nstore = ["a", "b\\u0000"]', "paths.store[1]", "must not hold a null character"),
        ('[paths]\nstore = ["a", "b", "a"]', "paths.store", "names 'a' twice"),
        ("[paths]\nstore = []", "paths.store", "must be a list of at least 1, found []"),
        ("seed = 18446744073709551616", "seed", "must be at most 9223372036854775807"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path, text, field, said):
    (line,) = problems(tmp_path, text)
    assert line.startswith(f"{field}: {said}")


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "-rf", "a b", "a\\b", "a" * 101])
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    (line,) = problems(tmp_path, f"name = '{name}'")
    assert line.startswith("name: must be a plain name")


@pytest.mark.parametrize("name", ["cat", "Käse_2.v1-b", "a" * 100])
def test_plain_names_are_taken(tmp_path, name):
    assert loaded(tmp_path, f'name = "{name}"').name == name


@pytest.mark.parametrize("text", [b"seed = ", b"seed = 1\nseed = 2", b"\xff\xfe", b"name = 'K\xe4se'"])
def test_invalid_toml_is_one_line_that_names_the_file(tmp_path, text):
    path = tmp_path / "my.toml"
    path.write_bytes(text)
    with pytest.raises(UserError) as refusal:
        load_experiment(path)
    assert str(refusal.value).startswith(f"{path}: not valid TOML: ")
    assert "\n" not in str(refusal.value)


def test_a_text_without_quotes_and_a_folder_for_a_file_are_told_what_to_write(tmp_path):
    (tmp_path / "my.toml").write_text("name = cat")
    for path, said in ((tmp_path / "my.toml", "; texts need quotes"), (tmp_path, "Is a directory; name a TOML file")):
        with pytest.raises(UserError) as refusal:
            load_experiment(path)
        assert str(refusal.value).endswith(said)


@pytest.mark.parametrize(
    "name, reason", [("none.toml", "No such file or directory"), ("", "Is a directory; name a TOML file")]
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(tmp_path, name, reason):
    with pytest.raises(UserError) as refusal:
        load_experiment(tmp_path / name)
    assert str(refusal.value) == f"{tmp_path / name}: cannot read the experiment file: {reason}"


def test_values_arrive_where_they_belong(tmp_path):
    text = """
    name = "cat"
    seed = 7
    [data]
    prompt = "ein Käse"
    [precision]
    preset = "fp16"
    vae = { params = "fp32", compute = "fp32" }
    [lora]
    targets = ["to_q", "to_out.0"]
    [train]
    learning_rate = 1
    posterior = "mode"
    """
    found = loaded(tmp_path, text)
    assert (found.name, found.seed, found.data.prompt) == ("cat", 7, "ein Käse")
    assert (found.precision.preset, found.precision.vae) == ("fp16", {"params": "fp32", "compute": "fp32"})
    assert found.lora.targets == ("to_q", "to_out.0")
    assert found.train.posterior == "mode"
    assert type(found.train.learning_rate) is float and found.train.learning_rate == 1.0


def test_a_resolution_may_be_a_list(tmp_path):
    assert loaded(tmp_path, "[data]\nresolution = [512, 768]").data.resolution == (512, 768)
    assert loaded(tmp_path, "[data]\nresolution = 768").data.resolution == 768


def test_an_empty_file_has_a_default_for_every_field(tmp_path):
    assert loaded(tmp_path, "") == Experiment(folder=tmp_path)


def test_every_default_is_a_value_that_a_file_may_say():
    said = json.loads(json.dumps(dataclasses.asdict(Settings())))
    assert checked(Settings, said) == (Settings(), [])


def test_every_number_has_a_lowest_and_a_highest_value():
    """Of a list, its items; what comes out of arithmetic without an end is an overflow or a machine without memory."""
    for table in json_schema()["$defs"].values():
        for name, field in table["properties"].items():
            for each in field.get("anyOf", [field]):
                each = each.get("items", each)
                if each.get("type") in ("integer", "number"):
                    assert each.keys() & {"minimum", "exclusiveMinimum"}, name
                    assert each.keys() & {"maximum", "exclusiveMaximum"}, name


def test_every_setting_is_described():
    schema = json_schema()
    settings = [
        *schema["properties"].items(),
        *(each for d in schema["$defs"].values() for each in d["properties"].items()),
    ]
    assert [name for name, found in settings if "$ref" not in found and not found.get("description")] == []


def test_the_page_about_the_experiment_file_is_up_to_date():
    page = Path(__file__).parent.parent / "docs/experiment.md"
    assert page.read_text() == as_markdown(), f"run: python -m pipeline schema --markdown > {page}"


def test_several_stores_keep_their_order(tmp_path):
    written(tmp_path, "[paths]\nstore = ['mine', '/team/store']")
    assert load_experiment(tmp_path / "my.toml").stores == (tmp_path / "mine", Path("/team/store"))


def test_relative_paths_are_relative_to_the_experiment_file(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    text = "[paths]\nstore = 'a/store'\nruns = '../runs'\n[data]\nimages = './photos'\n[model]\npath = 'flux'"
    written(tmp_path / "project", text)
    monkeypatch.chdir(tmp_path)
    found = load_experiment("project/my.toml")
    assert found.stores == (tmp_path / "project/a/store",)
    assert found.runs == tmp_path / "runs"
    assert found.images == tmp_path / "project/photos"
    assert found.model_path == tmp_path / "project/flux"


def test_absolute_paths_and_home_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = loaded(tmp_path, f"[paths]\nstore = '~/store'\n[data]\nimages = '{tmp_path}/elsewhere'")
    assert (found.stores, found.images) == ((tmp_path / "home/store",), tmp_path / "elsewhere")


def test_the_home_of_nobody_is_a_folder_that_does_not_exist(tmp_path):
    assert not loaded(tmp_path, "[data]\nimages = '~nobody-of-that-name/photos'").images.exists()


@pytest.mark.parametrize("path", ["black-forest-labs/FLUX.1-dev", "owner/name"])
def test_what_looks_like_a_hub_id_is_one_unless_there_is_such_a_folder(tmp_path, path):
    assert loaded(tmp_path, f"[model]\npath = '{path}'").model_path == path
    (tmp_path / path).mkdir(parents=True)
    assert loaded(tmp_path, f"[model]\npath = '{path}'").model_path == tmp_path / path


@pytest.mark.parametrize("path", ["./flux", "../flux", "flux", "models/flux/dev", "~/flux", "/models/flux", "owner/"])
def test_what_cannot_be_a_hub_id_is_a_local_folder(tmp_path, path):
    assert isinstance(loaded(tmp_path, f"[model]\npath = '{path}'").model_path, Path)


@pytest.mark.parametrize("nothing", [None, ""])
def test_without_a_file_the_embedded_default_lives_in_the_working_directory(tmp_path, monkeypatch, nothing):
    monkeypatch.chdir(tmp_path)
    found = load_experiment(nothing)
    assert found.name == tomllib.loads(DEFAULT.read_text())["name"] == "blicket"
    assert found.model_path == EMBEDDED
    assert found.images == tmp_path / "blickets"
    assert (found.stores, found.runs) == ((tmp_path / "store",), tmp_path / "runs")


def test_the_embedded_default_says_nothing_that_an_experiment_file_may_not(tmp_path):
    assert loaded(tmp_path, DEFAULT.read_text()) == dataclasses.replace(load_experiment(), folder=tmp_path)


# --- whatever somebody writes -------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**63, -(10**400), 1e308, "auto", "fp32", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TABLES = {name: list(table["properties"]) for name, table in json_schema()["$defs"].items()}
NAMES = sorted({name for fields in TABLES.values() for name in fields} | set(json_schema()["properties"]))


def test_a_file_that_is_not_there_is_said_with_the_one_that_was_meant(tmp_path):
    written(tmp_path, "")
    with pytest.raises(UserError, match=f"No such file or directory; did you mean {tmp_path}/my.toml[?]$"):
        load_experiment(tmp_path / "ym.toml")
    with pytest.raises(UserError, match="No such file or directory$"):
        load_experiment(tmp_path / "nowhere/my.toml")


DOCUMENTS = st.dictionaries(
    st.sampled_from(list(json_schema()["properties"])) | st.text(max_size=8),
    VALUES | st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
    max_size=4,
)


@given(document=DOCUMENTS)
@example(document={"paths": {"accumulate": None, "store": {}}})
@hypothesis_settings(derandomize=True, deadline=None, max_examples=150)
def test_whatever_a_file_says_it_is_an_experiment_or_lines_that_name_fields(document):
    found, problems = checked(Settings, document)
    assert (found is None) == bool(problems)
    for line in problems:
        name, separator, said = line.partition(": ")
        assert name and separator and said and len(line) < 2000


@given(component=st.sampled_from(list(model_configs.CONFIGS)), document=DOCUMENTS, data=st.data())
@hypothesis_settings(derandomize=True, deadline=None, max_examples=150)
def test_whatever_a_config_says_it_is_one_or_lines_that_name_fields(component, document, data):
    names = list(adapter(model_configs.CONFIGS[component][1]).json_schema()["properties"])
    document |= data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    problems = model_configs.problems(component, document)
    assert all(line.partition(": ")[2] for line in problems)
    model_configs.class_of(document)


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@hypothesis_settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_bytes_a_file_has_it_is_read_or_refused_in_one_message(tmp_path, data):
    path = tmp_path / "my.toml"
    path.write_bytes(data)
    try:
        found = load_experiment(path)
    except UserError as refusal:
        assert str(refusal).startswith(f"{path}: ")
    else:
        assert found.folder == tmp_path and set(found.tables) <= set(json_schema()["properties"])
