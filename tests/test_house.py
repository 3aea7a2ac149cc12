"""How the package is laid out: imports go one way, and a file can be read at a sitting."""

import ast
import graphlib
from pathlib import Path

import ulsam

ROOT = Path(ulsam.__file__).parent
#: As in docs/inside.md: each imports only from those that come after it.
FOLDERS = ("cli", "apps", "explanation", "study", "deploy", "training", "data", "model", "surgery", "layer", "base")
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imported(path: Path, *, for_types: bool) -> set[str]:
    """The modules of this package that a file imports, also inside of functions; `for_types`: and for types alone."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    names = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {module_of(name.removeprefix("ulsam.")) for name in names if name.split(".")[0] == "ulsam"}


def module_of(name: str) -> str:
    """Of `folder.file.Thing`, `folder.file`; of what `ulsam` itself offers, the module that it comes from."""
    for module in (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"):
        if module in FILES:
            return module
    return ulsam._HOME.get(name, "__init__").removeprefix("ulsam.")


def test_every_folder_imports_only_from_those_below_it() -> None:
    rank = {folder: number for number, folder in enumerate(FOLDERS)}
    upward = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imported(path, for_types=True)
        if rank.get(name.split(".")[0], -1) > rank.get(other.split(".")[0], len(rank))
    ]
    assert not upward
    assert {name.split(".")[0] for name in FILES if "." in name} == {*FOLDERS, "timm"}


def test_no_modules_import_each_other() -> None:
    graph = {name: imported(path, for_types=False) - {name} for name, path in FILES.items()}
    assert sum(map(len, graph.values())) > 500
    graphlib.TopologicalSorter(graph).prepare()  # raises at a cycle, and names it


def test_what_the_package_itself_offers_counts_as_where_it_is_from(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("from ulsam import train\nimport ulsam.study.grid\nfrom ulsam.base import errors\n")
    assert imported(path, for_types=True) == {"training.train", "study.grid", "base.errors"}


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for suffix in ("py", "pyi", "c", "h") for path in ROOT.rglob(f"*.{suffix}")]
    assert not [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400]
