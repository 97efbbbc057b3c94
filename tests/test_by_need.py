"""mindone's packages import by need: what they give is the same, and what no stage uses is not imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BY_NEED = "from pipeline.devices import by_need; by_need.install()\n"

PACKAGE = {
    "__init__.py": '''
        """A package with every form of import that mindone's have."""
        from .version import NUMBER, unused
        from .parts import One, Two as Second
        from .pad import pad
        from .parts.more import *
        from . import apart
        HALF = NUMBER / 2
        if HALF:
            from .conditional import There
        try:
            from .none import Missing
        except ImportError:
            Missing = None
        ''',
    "version.py": "NUMBER, unused = 4, 5",
    "pad.py": "def pad(): pass",
    "apart.py": "",
    "conditional.py": "from mindone import One\nclass There(One): pass",
    "parts/__init__.py": "from .one import One\nfrom .two import *\nfrom .three import Three",
    "parts/one.py": "class One: pass",
    "parts/two.py": "class Two: pass",
    "parts/three.py": "class Three: pass",
    "parts/more.py": "__all__ = ['More']\nclass More: pass\nclass Hidden: pass",
}


@pytest.fixture
def package(tmp_path):
    for name, text in PACKAGE.items():
        path = tmp_path / "mindone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("\n        ", "\n"))
    return tmp_path


def python(code: str, *folders: Path, by_need: bool = True) -> str:
    path = f"import sys; sys.path[:0] = {[*map(str, folders), str(ROOT)]}\n"
    command = [sys.executable, "-P", "-c", path + (BY_NEED if by_need else "") + code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


LOADED = "print(*sorted(name for name in sys.modules if name.startswith('mindone.')))"


def test_what_nobody_asks_for_is_not_loaded(package):
    assert python(f"import mindone\n{LOADED}", package) == "mindone.pad mindone.version"
    asked = "mindone mindone.pad mindone.parts mindone.parts.one mindone.parts.two mindone.version".split()
    assert python(f"from mindone import One\n{LOADED}", package).split() == asked[1:]


@pytest.mark.parametrize(
    "code",
    [
        "print(mindone.Second.__name__, mindone.More.__name__, mindone.There.__mro__, mindone.HALF, mindone.Missing)",
        "import mindone.pad; print(mindone.pad(), mindone.apart, mindone.conditional.There)",
        "from mindone.parts import *; print(One, Two, Three)",
        "from mindone import *; print(One, More, unused, There, apart, 'Hidden' in globals())",
        "print(hasattr(mindone, 'Hidden'), hasattr(mindone, 'Two'), hasattr(mindone, '__wrapped__'))",
        "from mindone import nothing",
    ],
)
def test_it_gives_what_the_package_gives_as_it_comes(package, code):
    code = f"import mindone\ntry:\n    {code}\nexcept ImportError as error:\n    print(str(error).partition(' (')[0])"
    plain = python(code, package, by_need=False)
    assert python(code, package).replace(" at 0x", "") == plain.replace(" at 0x", "") != ""


def test_a_package_that_cannot_be_parsed_is_imported_as_it_comes(package):
    text = "try:\n    import mindone\nexcept SyntaxError as error:\n    print(error.lineno)"
    (package / "mindone" / "__init__.py").write_text("from .parts import One\nfrom . import (")
    assert python(text, package) == python(text, package, by_need=False) == "2"


CLASSES = """if True:
    from pipeline.devices import device
    from pipeline.flux import models
    device.use("CPU")
    for component in models.CONFIGS:
        models.model_class(component) if component != "scheduler" else None
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler
    from mindone.peft import LoraConfig
    assert "mindone.trainers.zero" not in sys.modules
    from transformers import CLIPTokenizerFast, T5TokenizerFast
    import json
    print(json.dumps(sorted(sys.modules)))
"""

UNUSED = {
    "scipy.stats._stats_py",
    "pandas",
    "sklearn",
    "tensorboard",
    "torch",
    "tensorflow",
    "jax",
    "matplotlib",
    "datasets",
}
"""Modules that mindone or transformers import where they are installed, and that no stage uses."""


def test_a_stage_imports_nothing_that_it_does_not_use():
    loaded = set(json.loads(python(CLASSES, by_need=False).splitlines()[-1]))
    assert not loaded & UNUSED
    families = {name.split(".")[3] for name in loaded if name.startswith("mindone.transformers.models.")}
    assert families <= {"auto", "clip", "t5"}
    assert not any(name.startswith("mindone.diffusers.pipelines.") for name in loaded)
    mindspores = int(python("import mindspore; print(len(sys.modules))", by_need=False))
    assert len(loaded) < 1.6 * mindspores


EVERYTHING = """if True:
    import json, warnings
    warnings.simplefilter("ignore")
    import transformers.models.auto.modeling_auto
    from importlib import import_module
    found = {}
    for package in PACKAGES:
        module = import_module(f"mindone.{package}")
        known = [name for name, value in vars(module).items() if name[:2] != "__" and type(value) is not type(json)]
        for name in NAMES.get(package) or known:  # modules are there once something has imported them
            value = getattr(module, name)
            about = [str(getattr(value, each, "")) for each in ("__module__", "__name__")]
            found.setdefault(package, {})[name] = [type(value).__name__, *about]
    print(json.dumps(found))
"""
PACKAGES = ["transformers", "peft", "peft.utils", "diffusers.utils"]
PACKAGES += [f"diffusers.models.{name}" for name in ("transformers", "autoencoders", "controlnets", "unets")]


@pytest.mark.slow
def test_every_name_of_mindones_packages_is_what_it_is_without():
    def found(names: dict, by_need: bool) -> dict:
        code = f"PACKAGES, NAMES = {PACKAGES}, {names}\n{EVERYTHING}"
        return json.loads(python(code, by_need=by_need).splitlines()[-1])

    plain = found({}, by_need=False)
    assert sum(map(len, plain.values())) > 1500
    assert found({package: list(names) for package, names in plain.items()}, by_need=True) == plain


@pytest.mark.slow
def test_what_no_stage_uses_can_be_imported_later():
    for line in ("import mindone.diffusers.training_utils", "from mindone.diffusers import FluxPipeline"):
        code = f"from pipeline.devices import device; device.use('CPU')\n{line}\nprint('imported')\n"
        assert python(code, by_need=False).splitlines()[-1] == "imported"
