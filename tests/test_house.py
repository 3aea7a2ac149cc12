"""How the package is laid out: imports go one way, and a file can be read at a sitting."""

import ast
import graphlib
from pathlib import Path

import ulsam

ROOT = Path(ulsam.__file__).parent
#: As in docs/inside.md: each imports only from those that come after it.
FOLDERS = ("cli", "apps", "explanation", "study", "deploy", "training", "data", "model", "surgery", "layer", "base")
FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in ROOT.rglob("*.py")}


def imported(path: Path, *, when_loaded: bool) -> set[str]:
    """The modules of this package that a file imports; `when_loaded`: not those inside of functions, or for types."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    names = set()
    while nodes:
        node = nodes.pop()
        if when_loaded and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ulsam"):
            module = node.module.removeprefix("ulsam").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                names.add(inner if inner in FILES or f"{inner}.__init__" in FILES else module)
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("ulsam.") for alias in node.names if alias.name.startswith("ulsam.")}
    return {name if name in FILES else f"{name}.__init__" for name in names if name}


def test_every_folder_imports_only_from_those_below_it() -> None:
    rank = {folder: number for number, folder in enumerate(FOLDERS)}
    upward = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imported(path, when_loaded=False)
        if rank.get(name.split(".")[0], -1) > rank.get(other.split(".")[0], len(rank))
    ]
    assert not upward
    assert {name.split(".")[0] for name in FILES if "." in name} == {*FOLDERS, "timm"}


def test_no_modules_import_each_other() -> None:
    graph = {name: imported(path, when_loaded=True) - {name} for name, path in FILES.items()}
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()  # raises at a cycle, and names it


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for suffix in ("py", "pyi", "c", "h") for path in ROOT.rglob(f"*.{suffix}")]
    assert not [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400]
