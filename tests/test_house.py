"""The house: imports run downwards, files and functions stay short, and CONTRIBUTING.md has a line for every room."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = {path.stem: path for path in ROOT.glob("*.py")}
ROOMS = {f"mlm.{path.stem}": path for path in (ROOT / "mlm").glob("*.py") if path.stem != "__init__"}
FILES = TOP | ROOMS


def imports_of(path: Path) -> set[str]:
    """The product's own modules that a file imports, at its head or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


def test_imports_run_downwards():
    assert TOP.keys() == {"Config", "train", "downstream", "data_process", "model"}
    graph = {name: imports_of(path) for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError where files import each other in a circle
    for room in ROOMS:
        assert graph[room] & TOP.keys() <= {"Config"}, room
    assert not {name for name, imported in graph.items() if imported & {"train", "downstream"}}
    assert graph["Config"] <= {"mlm.errors", "mlm.settings"}


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert source.count("\n") <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name


def test_every_room_has_a_line_in_the_map():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    mapped = re.findall(r"^\| `(?:mlm/)?(\w+)\.py` \| \S", contributing, re.MULTILINE)
    assert sorted(mapped) == sorted(name.removeprefix("mlm.") for name in FILES)


def test_every_test_that_holds_a_law_exists():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    laws = contributing.partition("## The laws")[2]
    assert re.findall(r"^(\d)\. ", laws, re.MULTILINE) == list("12345678")
    named = re.findall(r"`(test_\w+)\.py`(?::\s((?:`test_\w+`(?:,\s+)?)+))?", laws)
    assert len(named) >= 8 and sum(len(tests) > 0 for _, tests in named) >= 8
    for file, tests in named:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        for test in re.findall(r"`(test_\w+)`", tests):
            assert f"def {test}(" in source, f"{file}.py has no {test}"
