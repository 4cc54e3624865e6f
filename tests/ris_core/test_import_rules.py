"""Who may import whom, read from the source: the library stands alone, each tool has its doors, arrows point down, and
there are no circles.
"""

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
PACKAGES = ("ris_core", "pipelines", "benchmarks")
# Folders and modules of ris_core from the bottom up, in the order of design.md; of one floor, one may know another, as long
# as there is no circle.
FLOORS = (
    {"errors"},
    {"options", "yaml_file"},
    {"files", "room"},
    {"storage"},
    {"device"},
    {"contents"},
    {"weights"},
    {"data"},
    {"models"},
    {"evaluation", "predictor", "encodings"},
    {"training"},
    {"config"},
    {"train"},
)
OWN = "ris_core.data.own"
SOURCES = (
    "ris_core.data.refer",
    "ris_core.data.shapes",
    OWN,
)  # of records: folders that the rest of data does not know
HEAVY = ("torch", "ray", "mlflow", "pandas", "open_clip", "matplotlib")


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` is a.b.c. `eager` ones run when the module itself is imported, `typing` ones
    never do: they are for type checkers.
    """

    name: str
    eager: bool
    line: int
    typing: bool = False

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


def imports(node: ast.AST, eager: bool = True, typing: bool = False) -> Iterator[Import]:
    """Imports below a node; those in functions and for type checkers only are not eager."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, eager, child.lineno, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: write imports in full"
            yield from (Import(f"{child.module}.{alias.name}", eager, child.lineno, typing) for alias in child.names)
        else:
            checked = is_type_checking(child)
            lazy = checked or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, eager and not lazy, typing or checked)


def importers(package: str, tops: set[str]) -> list[str]:
    """`module:line imports x` for each import, eager or not, of one of `tops` within a package of ours."""
    return [
        f"{module}:{found.line} imports {found.name}"
        for module, tree in TREES.items()
        if module.split(".")[0] == package
        for found in imports(tree)
        if found.top in tops
    ]


def owner(name: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def arrows(package: str, within: str | None = None) -> Iterator[tuple[str, str, str]]:
    """(module, module that it imports, what to say of it) within packages, at the top or in functions, but not for type
    checkers.
    """
    for module, tree in TREES.items():
        for found in imports(tree):
            target = owner(found.name)
            if target and not found.typing and below(module, package) and below(target, within or package):
                yield module, target, f"{MODULES[module].relative_to(ROOT)}:{found.line} imports {found.name}"


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def folder(module: str) -> str:
    """The package that a module's file lies in; modules right in ris_core stand for themselves."""
    home = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    return module if home == "ris_core" else home


def unit(module: str) -> str:
    """The folder or module right in ris_core that a module is, or is in; nothing for the empty package itself."""
    return module.split(".")[1] if "." in module else ""


def stands_on(module: str, target: str) -> bool:
    """Whether a module of ris_core may import another: of its own floor, or of one below."""
    levels = [next((n for n, units in enumerate(FLOORS) if unit(name) in units), -1) for name in (module, target)]
    return levels[1] <= levels[0]


def test_the_walk_sees_everything() -> None:
    """Guards the other tests: the walk finds the modules, and lazy imports too."""
    assert {"ris_core.training.loop", "pipelines.cli", "pipelines.cluster", "ris_core.models"} <= set(MODULES)
    tree = ast.parse(
        "import a\ndef f():\n    from b import c\nclass K:\n    import d\nif TYPE_CHECKING:\n    import e\n"
    )
    assert [(found.name, found.eager, found.typing) for found in imports(tree)] == [
        ("a", True, False),
        ("b.c", False, False),
        ("d", True, False),
        ("e", False, True),
    ]
    assert owner("ris_core.data.masks.encode") == "ris_core.data.masks"
    assert owner("ris_core.models") == "ris_core.models"
    assert folder("ris_core.models") == folder("ris_core.models.clip") == "ris_core.models"
    assert folder("ris_core.models.cris") == folder("ris_core.models.cris.layers") == "ris_core.models.cris"
    assert folder("ris_core.errors") == "ris_core.errors"
    assert len(list(arrows("ris_core"))) > 200


def test_the_library_knows_nothing_of_the_orchestration() -> None:
    assert importers("ris_core", {"ray", "mlflow", "dvc", "pipelines", "pandas", "typer", "jinja2"}) == []


def test_nobody_imports_dvc() -> None:
    assert [line for package in PACKAGES for line in importers(package, {"dvc"})] == []


def test_mlflow_has_four_doors() -> None:
    doors = {line.split(":")[0] for package in PACKAGES for line in importers(package, {"mlflow"})}
    assert doors == {f"pipelines.{name}" for name in ("tracking", "versions", "packaging", "serving_model")}


def test_packages_point_down() -> None:
    """benchmarks -> pipelines -> ris_core; nothing that is shipped knows of the tests or the benchmarks."""
    assert importers("ris_core", {"pipelines", "benchmarks"}) == []
    assert importers("pipelines", {"benchmarks"}) == []
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    assert [line for package in PACKAGES for line in importers(package, tests)] == []


def test_every_module_of_the_library_has_its_floor() -> None:
    units = [unit(module) for module in MODULES if below(module, "ris_core") and unit(module)]
    assert set(units) == set().union(*FLOORS)


def test_arrows_of_the_library_point_down() -> None:
    assert [line for module, target, line in arrows("ris_core") if not stands_on(module, target)] == []


def test_nobody_imports_the_command() -> None:
    lines = [line for package in PACKAGES for _, _, line in arrows(package, "ris_core.train")]
    assert [line for line in lines if not line.startswith("ris_core/train.py")] == []


def test_sources_of_records_are_known_to_nobody_else_of_data() -> None:
    """data/refer and data/shapes stand on data/*.py, not the other way, and each on its own; data/own reads COCO's
    files, and joins and checks what it read, as data/refer does, which it therefore stands on.
    """
    for source in SOURCES:
        assert any(arrows(source, "ris_core.data"))
        allowed = (source, OWN) if source == "ris_core.data.refer" else (source,)
        arriving = arrows("ris_core.data", source)
        assert [line for module, _, line in arriving if not any(below(module, each) for each in allowed)] == []


def test_a_system_knows_no_other_and_is_known_by_its_name_alone() -> None:
    """Folders of systems stand on models/*.py, never the other way and never on each other."""
    systems = sorted(name for name, path in MODULES.items() if path.parent.parent == ROOT / "ris_core/models")
    systems = sorted({folder(name) for name in systems if MODULES[name].name == "__init__.py"})
    assert systems == [f"ris_core.models.{name}" for name in ("cris", "global_local", "lts", "risclip")]
    for system in systems:
        assert any(arrows(system, "ris_core.models"))
        others = [line for module, _, line in arrows("ris_core", system) if not below(module, system)]
        assert others == []


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_no_circle_between_folders(package: str) -> None:
    """Counting imports in functions, too."""
    graph: dict[str, set[str]] = {}
    for module, target, _ in arrows(package):
        graph.setdefault(folder(module), set()).add(folder(target))
    without_itself = {name: targets - {name} for name, targets in graph.items()}
    assert package != "ris_core" or any(without_itself.values())
    try:
        TopologicalSorter(without_itself).prepare()
    except CycleError as error:
        ring = error.args[1]
        steps = {(folder(module), folder(target)): line for module, target, line in arrows(package)}
        lines = [steps[step] for step in zip(ring[1:], ring[:-1], strict=True) if step in steps]
        pytest.fail(f"these folders import each other: {' -> '.join(ring)}: {'; '.join(lines)}")


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


# Work at import time that is meant: MLflow wants its model set by the module.
MEANT = {"pipelines.serving_model": ast.Expr, "pipelines": ast.For}
DECLARATIONS = (
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign),
)


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
