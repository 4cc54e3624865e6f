"""Who may import whom, read from the source: the library stands alone, each tool has one door, there are no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ris_core", "pipelines")
HEAVY = ("torch", "ray", "mlflow", "pandas", "open_clip", "matplotlib")


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` is a.b.c. `eager` ones run when the module itself is imported."""

    name: str
    eager: bool
    line: int

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


def sources() -> dict[str, Path]:
    """All modules of the project by their dotted names."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = sources()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST, eager: bool = True) -> Iterator[Import]:
    """Imports below a node; those in functions and for type checkers only are not eager."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, eager, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: write imports in full"
            yield from (Import(f"{child.module}.{alias.name}", eager, child.lineno) for alias in child.names)
        else:
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(child)
            yield from imports(child, eager and not lazy)


def importers(package: str, tops: set[str]) -> list[str]:
    """`module:line imports x` for each import, eager or not, of one of `tops` within a package of ours."""
    return [
        f"{module}:{found.line} imports {found.name}"
        for module, tree in TREES.items()
        if module.split(".")[0] == package
        for found in imports(tree)
        if found.top in tops
    ]


def test_the_walk_sees_everything() -> None:
    """Guards the other tests: the walk finds the modules, and lazy imports too."""
    assert {"ris_core.training.loop", "pipelines.cli", "pipelines.cluster", "ris_core.models"} <= set(MODULES)
    tree = ast.parse(
        "import a\ndef f():\n    from b import c\nclass K:\n    import d\nif TYPE_CHECKING:\n    import e\n"
    )
    assert [(found.name, found.eager) for found in imports(tree)] == [
        ("a", True),
        ("b.c", False),
        ("d", True),
        ("e", False),
    ]


def test_the_library_knows_nothing_of_the_orchestration() -> None:
    assert importers("ris_core", {"ray", "mlflow", "dvc", "pipelines", "pandas", "typer", "jinja2"}) == []


def test_nobody_imports_dvc() -> None:
    assert [line for package in PACKAGES for line in importers(package, {"dvc"})] == []


def test_mlflow_has_two_doors() -> None:
    doors = {line.split(":")[0] for line in importers("pipelines", {"mlflow"})}
    assert doors == {"pipelines.tracking", "pipelines.serving_model"}


def test_ray_is_started_in_one_place() -> None:
    starters = [
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "init"
        and isinstance(node.value, ast.Name)
        and node.value.id == "ray"
    ]
    assert set(starters) == {"pipelines.cluster"}
    renamed = [line for line in importers("pipelines", {"ray"}) if line.endswith("imports ray.init")]
    assert renamed == []


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_circles(package: str) -> None:
    graph = {
        module: {target for found in imports(tree) if found.eager and (target := owner(found.name))} - {module}
        for module, tree in TREES.items()
        if module.split(".")[0] == package
    }
    assert any(graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' -> '.join(error.args[1])}")


def owner(name: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


# Work at import time that is meant: commands are declared in a loop, and MLflow wants its model set by the module.
MEANT = {"pipelines.cli": ast.For, "pipelines.serving_model": ast.Expr}
DECLARATIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_only_declares(module: str) -> None:
    working = [
        f"{MODULES[module].relative_to(ROOT)}:{node.lineno}"
        for node in TREES[module].body
        if not isinstance(node, DECLARATIONS)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))  # a docstring
        and not is_type_checking(node)
        and ast.unparse(node).split("\n")[0] != "if __name__ == '__main__':"
        and not isinstance(node, MEANT.get(module, ()))
    ]
    assert working == []


def test_the_command_line_starts_light() -> None:
    code = f"import sys, pipelines.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_library_loads_without_the_orchestration() -> None:
    code = (
        "import importlib, sys\n"
        "for name in ('ray', 'mlflow', 'dvc', 'pandas', 'typer', 'pipelines'): sys.modules[name] = None\n"
        f"for name in {[name for name in MODULES if name.startswith('ris_core')]}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
