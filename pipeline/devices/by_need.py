"""mindone's packages, importing a name when it is asked for.

As it comes, ``from mindone.transformers import CLIPTextModel`` runs some 330 lines ``from .models.x import Y``, each of
which loads a model that nobody here uses.  Once `install` has been called, such a line in a package of mindone's waits
until somebody asks the package for one of its names.  Modules and names are the same as without it; they are loaded
later, most of them never.  A package whose file has a form that is not known here is imported as it comes.
"""

import ast
import functools
import os
import sys
from collections.abc import Container
from importlib import import_module
from importlib.machinery import PathFinder, SourceFileLoader
from types import ModuleType

PACKAGE = "mindone"
UNUSED = ("scipy.stats", "scipy.integrate")
"""What mindone's schedulers import, ``import scipy.stats``, and use for noise levels that are not FLUX.1's."""

SCANNER, SCAN = "transformers.utils.import_utils", "create_import_structure_from_path"
"""The module and the function by which transformers looks for names in its 1,400 files: twice, unless it remembers."""

WAIT = "__wait__"
"""The name that a package's code has for `Waiting.add`."""


def install() -> None:
    """Let the packages of mindone that are imported from now on import by need; safe to call twice."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)


class Finder:
    """Finds what Python's own finder finds, and gives it another loader."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in (*UNUSED, SCANNER) and name.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        if loader := _loader_of(name, spec.submodule_search_locations is not None):
            spec.loader = loader(name, spec.loader.path)
        return spec


def _loader_of(name: str, is_package: bool) -> type[SourceFileLoader] | None:
    if name == SCANNER:
        return Remembering
    if name in UNUSED:
        return Later
    return Loader if is_package else None


class Remembering(SourceFileLoader):
    """Loads transformers' scanner, whose own memory holds a third of the folders that it looks at."""

    def exec_module(self, module):
        super().exec_module(module)
        scan = getattr(getattr(module, SCAN, None), "__wrapped__", None)
        if scan is not None:
            setattr(module, SCAN, functools.cache(scan))


class Later(SourceFileLoader):
    """Loads a module when something in it is asked for.  (importlib's LazyLoader does when it is imported twice.)"""

    def exec_module(self, module):
        def get(name: str):
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            vars(module).pop("__getattr__", None)
            super(Later, self).exec_module(module)
            return getattr(module, name)

        vars(module)["__getattr__"] = get


class Loader(SourceFileLoader):
    """Loads a package of which some imports wait."""

    def get_code(self, fullname):
        """Python's compiled file has the imports as they come, and is neither used nor written."""
        parts = {entry.partition(".")[0] for entry in os.listdir(os.path.dirname(self.path))}
        try:
            tree = with_waiting(ast.parse(self.get_data(self.path)), parts)
        except (SyntaxError, ValueError):
            return super().get_code(fullname)
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module):
        waiting = Waiting(module)
        vars(module).update({WAIT: waiting.add, "__getattr__": waiting.get})
        super().exec_module(module)


class Waiting:
    """The imports of a package that wait for somebody to ask for one of their names."""

    def __init__(self, package: ModuleType):
        self._package = package
        self._lines: dict[str, str] = {}  # by the package's name for something: the line that imports it
        self._whole: list[str] = []  # lines that import all that a module has
        self._modules: set[str] = set()  # parts of the package that the lines import in passing

    def add(self, module: str, *names: str) -> None:
        """In place of ``from MODULE import NAME as OWN, ...``, told as MODULE, NAME, OWN, ..."""
        if module == ".":
            self._modules.update(names)
            return
        if part := module.removeprefix(".").partition(".")[0]:
            self._modules.add(part)
        for name, own in zip(names[::2], names[1::2]):
            if name == "*":
                self._whole.append(f"from {module} import *")
            else:
                vars(self._package).pop(own, None)
                self._lines[own] = f"from {module} import {name} as {own}"

    def get(self, name: str):
        """The package's ``__getattr__``: what is asked for, imported now."""
        if name == "__all__":  # where the package lists no names, `from PACKAGE import *` takes all that it has
            self._import_all()
        elif name in self._lines:
            self._run(self._lines[name])
        elif name in self._modules:
            self._import_module(name)
        elif not name.startswith("__"):
            self._import_whole()
        if name in vars(self._package):
            return vars(self._package)[name]
        raise AttributeError(f"module {self._package.__name__!r} has no attribute {name!r}")

    def _run(self, line: str) -> None:
        exec(line, vars(self._package))

    def _import_module(self, name: str) -> None:
        import_module(f".{name}", self._package.__name__)

    def _import_whole(self) -> None:
        while self._whole:
            self._run(self._whole[0])
            self._whole = self._whole[1:]

    def _import_all(self) -> None:
        self._import_whole()
        for name in list(self._modules):
            self._import_module(name)
        for own, line in self._lines.items():
            if own not in vars(self._package):
                self._run(line)


def with_waiting(tree: ast.Module, parts: Container[str] = ()) -> ast.Module:
    """The code of a package, its relative imports made to wait but for those whose names it uses itself.

    parts: the names of its modules.  A name that is one of them too is not made to wait: it would be taken for the
    module once somebody imports that.
    """
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}

    def waiting(statement: ast.stmt) -> ast.stmt:
        if isinstance(statement, ast.If):
            statement.body, statement.orelse = (list(map(waiting, each)) for each in (statement.body, statement.orelse))
        elif isinstance(statement, ast.ImportFrom) and statement.level and _can_wait(statement, used, parts):
            return _call(statement)
        return statement

    tree.body = list(map(waiting, tree.body))
    return tree


def _can_wait(statement: ast.ImportFrom, used: Container[str], parts: Container[str]) -> bool:
    """Whether nobody can see that it waits.  What ``from .x import *`` gives is not known, and may be called x."""
    if not statement.module and statement.level == 1:
        return all(each.name in parts and not each.asname and each.name not in used for each in statement.names)
    if any(each.name == "*" for each in statement.names):
        return "." in (statement.module or "")
    names = [each.asname or each.name for each in statement.names]
    return not any(name in used or (statement.module and name in parts) for name in names)


def _call(statement: ast.ImportFrom) -> ast.stmt:
    """A call of `Waiting.add` in place of an import."""
    module = "." * statement.level + (statement.module or "")
    names = [text for each in statement.names for text in (each.name, each.asname or each.name)]
    call = ast.Expr(ast.Call(ast.Name(WAIT, ast.Load()), list(map(ast.Constant, [module, *names])), []))
    return ast.fix_missing_locations(ast.copy_location(call, statement))
