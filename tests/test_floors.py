"""The house of docs/design.md: imports go downward only, and the rules that each file obeys."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxhandler"

# Floor by floor, from the ground up: the modules and packages of jaxhandler.
FLOORS = (
    {"checksums", "errors", "files", "leaving", "tally", "tensors", "trees", "typing", "versions"},
    {"checkpointing", "plans"},
    {"data", "models"},
    {"handlers"},
    {"ensembles", "inference"},
    {"assembly"},
    {"__init__", "__main__"},
)
FLOOR = {place: floor for floor, places in enumerate(FLOORS) for place in places}
# Neighbours that may be imported on their own floor: what needs nothing itself, but errors.
GROUND = {"checksums", "errors"}

CORE = {"jax", "jaxhandler", "numpy", "optax", "zlib_ng", *sys.stdlib_module_names}
LAZY = {"flax", "grain", "h5py", "keras", "matplotlib", "orbax", "pyarrow", "ray", "rich"}
LAZY |= {"ase", "safetensors", "sklearn", "tensorstore", "vesin", "zarr"}
LONGEST_FILE = 400


def module_of(path: Path) -> str:
    """The dotted name of a file of ours: `jaxhandler/data/order.py` is `jaxhandler.data.order`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}
each_module = pytest.mark.parametrize("module", FILES)


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The dotted names that these nodes import; of ours, the module that is meant."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import from jaxhandler by its full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            while name.startswith("jaxhandler.") and name not in FILES:
                name = name.rpartition(".")[0]
            yield name


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: all but functions' bodies and type checkers' imports."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not isinstance(child, functions) and not for_types:
            yield child
            yield from run_at_import(child)


def place(module: str) -> str:
    """Where a module of ours stands in the house: the part after `jaxhandler.`."""
    return module.split(".")[1] if "." in module else "__init__"


def own_imports(module: str) -> set[str]:
    return {name for name in imports(ast.walk(TREES[module])) if name in FILES} - {module}


@each_module
def test_has_a_floor(module: str) -> None:
    assert place(module) in FLOOR, f"give {module} a floor, here and in docs/design.md"


@each_module
def test_imports_go_downward(module: str) -> None:
    here = place(module)
    for target in own_imports(module):
        there = place(target)
        allowed = there == here or FLOOR[there] < FLOOR[here] or there in GROUND - {here}
        assert allowed, f"{module} imports {target}"


def test_imports_are_acyclic() -> None:
    try:
        TopologicalSorter({module: own_imports(module) for module in FILES}).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


@each_module
def test_optional_imports_are_lazy(module: str) -> None:
    """Importing a module needs no extra, and nothing that is slow to import."""
    for name in imports(run_at_import(TREES[module])):
        assert name.split(".")[0] in CORE, f"{module} imports {name} when it is imported"


def imported_by(statement: str) -> set[str]:
    """The modules that a new process has imported after a statement."""
    command = [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return set(shown.split())


def test_importing_all_public_names_imports_nothing_optional() -> None:
    modules = {name.split(".")[0] for name in imported_by("from jaxhandler import *")}
    assert "jaxhandler" in modules
    assert not LAZY.intersection(modules)


def test_importing_the_package_imports_the_upper_floors_when_they_are_named() -> None:
    upper = {"jaxhandler.assembly", "jaxhandler.ensembles", "jaxhandler.inference"}
    assert not upper.intersection(imported_by("import jaxhandler"))
    assert upper.intersection(imported_by("import jaxhandler; jaxhandler.batch_loss")) == {
        "jaxhandler.ensembles"
    }


@each_module
def test_uses_no_private_jax(module: str) -> None:
    for name in imports(ast.walk(TREES[module])):
        assert not name.startswith("jax._src"), f"{module} imports {name}"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            assert node.attr != "_src", f"{module}:{node.lineno} uses a private module"


@pytest.mark.parametrize("folder", ["jaxhandler", "examples", "benchmarks"])
def test_files_are_short(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines"
