"""Import rules of the design, read from the sources; they hold without running."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "molora": "molora",
    "molora.kernels": "kernels",
    "molora.routers": "routers",
    "molora.training": "training",
}
# packages whose files each add one entry to a table of names
SEAMS = [
    "molora.collapse",
    "molora.experts",
    "molora.routers",
    "molora.training.optimizers",
    "molora.training.recipes",
]
ALLOWED = {
    "molora.kernels": ["molora.cache", "molora.errors", "molora.kernels"],
    "molora.routers": [
        "molora.context",
        "molora.errors",
        "molora.registry",
        "molora.kernels",
        "molora.routers",
        "molora.schema",
    ],
}
FORBIDDEN = {
    "molora.experts": ["molora.model", "molora.training"],
    "molora": ["molora.cli"],
}
PUBLIC_ONLY = ["molora.collapse", "molora.training"]
BARE = ["kernels", "routers", "training"]


def sources() -> dict[str, ast.Module]:
    """Dotted module name to syntax tree; a package stands under its own name."""
    trees = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            inner = parts[:-1] if parts[-1] == "__init__" else parts
            trees[".".join([package, *inner])] = ast.parse(path.read_text("utf-8"))
    return trees


TREES = sources()


def under(name: str, packages: list[str]) -> bool:
    """Whether name is one of the packages or lies in one."""
    return any(name == p or name.startswith(p + ".") for p in packages)


def imports(tree: ast.Module) -> list[tuple[str, str]]:
    """Pairs (module, name) of every import; the name is empty for ``import module``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(module, alias.name) for alias in node.names]
    return found


def target(module: str, name: str) -> str:
    """The module that an import loads: ``from molora import cli`` loads molora.cli."""
    inner = f"{module}.{name}"
    return inner if inner in TREES else module


def breaches(importer: str, tree: ast.Module) -> list[str]:
    """Every rule that the imports of one module break, in words."""
    broken = []
    for module, name in imports(tree):
        loaded = target(module, name)
        said = f"{importer} imports {module}{'.' + name if name else ''}"
        if module.startswith("."):
            broken.append(f"{said}: relative import")
        if under(loaded, BARE):
            broken.append(f"{said}: lacks the molora prefix")
        if not under(loaded, ["molora"]):
            continue
        for package, allowed in ALLOWED.items():
            if under(importer, [package]) and not under(loaded, allowed):
                broken.append(f"{said}: {package} may import only {allowed}")
        for package, forbidden in FORBIDDEN.items():
            inside = under(importer, forbidden)
            if under(importer, [package]) and under(loaded, forbidden) and not inside:
                broken.append(f"{said}: {package} may not import it")
        private = any(p.startswith("_") for p in [*module.split("."), name])
        if under(importer, PUBLIC_ONLY) and private:
            broken.append(f"{said}: not public")
    return broken


def registers(tree: ast.Module) -> bool:
    """Whether the module files a class or function in a table of names."""
    return any(
        isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("register")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        for mark in node.decorator_list
    )


def unreachable(trees: dict[str, ast.Module]) -> list[str]:
    """Files of the seams that no user can reach: not imported where they must be."""
    loaded_by = {
        name: {target(*pair) for pair in imports(tree)} for name, tree in trees.items()
    }
    lost = []
    for name, tree in trees.items():
        package = name.rpartition(".")[0]
        if package not in SEAMS:
            continue
        if registers(tree) and name not in loaded_by[package]:
            lost.append(f"{name} registers something and {package} does not import it")
        elif not any(name in loaded for loaded in loaded_by.values()):
            lost.append(f"nothing imports {name}")
    return lost


@pytest.mark.parametrize("module", TREES)
def test_imports_keep_the_rules(module: str) -> None:
    assert breaches(module, TREES[module]) == []


def test_every_file_of_a_seam_is_imported() -> None:
    assert unreachable(TREES) == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("molora.kernels.torch_path", "import molora.schema"),
        ("molora.kernels.torch_path", "from molora import routers"),
        ("molora.routers.topk", "from molora.experts.base import EXPERTS"),
        ("molora.routers.topk", "def f():\n    import molora.training"),
        ("molora.experts.lora", "from molora.training import data"),
        ("molora.experts.lora", "import molora.model"),
        ("molora.report", "from molora.cli import main"),
        ("molora.training.trainer", "import molora.cli"),
        ("molora.training.trainer", "from molora.layer import _mask"),
        ("molora.collapse.svd", "from molora._hidden import mask"),
        ("molora.layer", "import kernels"),
        ("molora.layer", "from routers.topk import TopKRouter"),
        ("molora.layer", "from .config import AdapterConfig"),
    ],
)
def test_a_planted_breach_is_found(importer: str, line: str) -> None:
    assert len(breaches(importer, ast.parse(line))) == 1


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("molora.kernels.dispatch", "from molora.errors import ConfigError"),
        ("molora.routers.topk", "from molora.context import Context\nimport torch"),
        ("molora.experts.lora", "from molora.kernels import lowrank_mixture"),
        ("molora.layer", "from molora.config import _private"),
        ("molora.cli", "import molora.cli"),
    ],
)
def test_a_proper_import_is_let_through(importer: str, line: str) -> None:
    assert breaches(importer, ast.parse(line)) == []


def test_a_planted_lost_file_is_found() -> None:
    entry = ast.parse("@EXPERTS.register('x', paper='p')\nclass X: ...")
    helper = ast.parse("def help(): ...")
    planted = {"molora.experts.x": entry, "molora.experts.helper": helper}
    assert unreachable(TREES | planted) == [
        "molora.experts.x registers something and molora.experts does not import it",
        "nothing imports molora.experts.helper",
    ]


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_package_is_installed_and_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    tool = project["tool"]["setuptools"]
    packages = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(tool["packages"]) == packages
    assert tool["package-dir"] == FOLDERS
    for folder in FOLDERS.values():
        assert (ROOT / folder / "py.typed").exists()


def test_every_dependency_is_pinned_once_and_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    pattern = re.compile(r"([A-Za-z0-9._-]+)==\d[\w.]*")
    # no build tag such as +cpu: an index without that build could not serve it
    assert [pin for pin in pins if not pattern.fullmatch(pin)] == []
    pinned = [re.sub(r"[._]", "-", pin.split("==")[0].lower()) for pin in pins]
    assert len(pinned) == len(set(pinned))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[<>=!~\[; ]", item)[0].lower() for item in wanted}
    assert names <= set(pinned)
