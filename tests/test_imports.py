"""Imports between the packages point one way, see `LAYERS`."""

import ast
from pathlib import Path

import pytest

import guardians

ROOT = Path(guardians.__file__).parent
LAYERS = [
    {"data", "figures", "models", "statistics", "tables"},
    {"engine"},
    {"attacks"},
    {"defences", "estimators", "training"},
    {"toolkits"},
    {"evaluation"},
    {"experiments"},
    {"parity"},
    {"adapters", "cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
WITHIN_A_LAYER = {("estimators", "defences"), ("training", "defences")}


def imports(path):
    """Of a module, as dotted names, wherever in it they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


MODULES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_is_below_it(path):
    importer = part_of(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        imported = rest.split(".")[0]
        if package != "guardians" or imported in ("", "__version__", importer):
            continue
        below = LEVEL[imported] < LEVEL[importer] or (importer, imported) in WITHIN_A_LAYER
        assert below, f"{path.relative_to(ROOT)} imports {name}"


def test_the_engine_stands_alone():
    for path in (ROOT / "engine").glob("*.py"):
        parts = {name.split(".")[1] for name in imports(path) if name.startswith("guardians.")}
        assert parts <= {"engine", "models", "data"}


def test_the_package_itself_imports_nothing():
    assert not [name for name in imports(ROOT / "__init__.py") if name.startswith("guardians")]


def test_only_the_toolkits_import_the_optional_packages():
    for path in MODULES:
        packages = {name.split(".")[0] for name in imports(path)}
        assert not packages & {"torchattacks", "foolbox"}, path


def test_every_part_has_a_layer():
    assert {part_of(path) for path in MODULES} == set(LEVEL)
