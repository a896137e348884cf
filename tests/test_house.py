"""The house: imports run one way, the parts stay small, and CONTRIBUTING.md has a row for each."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from runs import ROOT

GROUND = ("errors", "randomness", "settings", "storage", "terminal")
WINGS = (
    "runtime",
    "text",
    "data",
    "encoder",
    "evaluation",
    "training",
    "report",
    "downstream",
)  # in the order of what they stand on
TOP = ("Config", "data_process", "model", "train", "downstream")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {module_of(path): path for path in [*ROOT.glob("*.py"), *ROOT.glob("mlm/**/*.py")]}


def part_of(module: str) -> str:
    """The part of the house that a module is in: a file on top, "ground floor", or a wing."""
    head, *rest = module.split(".")
    if head != "mlm":
        return f"{head}.py"
    return rest[0] if rest and rest[0] in WINGS else "ground floor"


def may_import(part: str) -> set[str]:
    """The parts that a part of the house may import, itself included."""
    below = ["ground floor", "Config.py", "runtime", "text", "data", "encoder", "evaluation"]
    return {
        "ground floor": {"ground floor"},
        "Config.py": {"ground floor"},
        **{wing: {*below[: below.index(wing) + 1]} for wing in below[2:]},
        "data_process.py": {*below},
        "model.py": {*below},
        "training": {*below, "training"},
        "report": {*below, "training", "report"},
        "downstream": {*below, "training", "downstream"},
        "train.py": {*below, "training", "report", "data_process.py", "model.py"},
        "downstream.py": {*below, "training", "report", "downstream", "data_process.py", "model.py"},
    }[part]


def imports_of(path: Path) -> set[str]:
    """The product's own modules that a file imports, at its head or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in FILES or f"{name}.__init__" in FILES}


IMPORTS = {name: imports_of(path) for name, path in FILES.items()}


def test_imports_run_one_way():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError where files import each other in a circle
    for name, imported in IMPORTS.items():
        assert {part_of(other) for other in imported} <= may_import(part_of(name)), name
    assert IMPORTS["Config"] <= {"mlm.errors", "mlm.settings"}


def test_the_house_has_eight_wings_over_a_ground_floor():
    assert {path.stem for path in ROOT.glob("*.py")} == {*TOP}
    assert {path.stem for path in (ROOT / "mlm").glob("*.py")} == {*GROUND, "__init__"}
    assert {path.name for path in (ROOT / "mlm").iterdir() if path.is_dir() and path.name != "__pycache__"} == {*WINGS}
    for wing in WINGS:
        rooms = [path for path in (ROOT / "mlm" / wing).glob("*.py") if path.stem != "__init__"]
        assert len(rooms) <= 12, wing
        [sentence] = ast.parse((ROOT / "mlm" / wing / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(sentence, ast.Expr), f"{wing}/__init__.py is one docstring and hands nothing on"


def test_only_those_who_carry_a_run_see_it_whole():
    """All else takes the parts that it uses."""
    carriers = {
        name for name, path in FILES.items() if re.search(r"import .*\bRun\b", path.read_text(encoding="utf-8"))
    }
    assert carriers == {"train", "mlm.training.checkpoint", "mlm.report.dry_run"}


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert source.count("\n") <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_every_part_of_the_house_has_a_row_in_the_map():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    mapped = re.findall(r"^\| `([\w./]+)` \| \S", contributing, re.MULTILINE)
    wanted = [*(f"{name}.py" for name in TOP), *(f"mlm/{name}.py" for name in GROUND), *(f"mlm/{w}/" for w in WINGS)]
    assert sorted(mapped) == sorted(wanted)


def test_every_test_that_holds_a_law_exists():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    laws = contributing.partition("## The laws")[2]
    assert re.findall(r"^(\d)\. ", laws, re.MULTILINE) == list("12345678")
    named = re.findall(r"`(test_\w+)\.py`(?::\s((?:`test_\w+`(?:,\s+)?)+))?", laws)
    assert len(named) >= 8 and sum(len(tests) > 0 for _, tests in named) >= 8
    for file, tests in named:
        [path] = (ROOT / "tests").rglob(f"{file}.py")
        source = path.read_text(encoding="utf-8")
        for test in re.findall(r"`(test_\w+)`", tests):
            assert f"def {test}(" in source, f"{file}.py has no {test}"
