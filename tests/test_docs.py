"""The README and docs/: short, in step in both languages, with links that lead somewhere and commands that parse."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from Config import Config, DownstreamConfig, parse_downstream_flags, parse_flags

ROOT = Path(__file__).parent.parent
ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs" / "zh-CN").glob("*.md"))]
PAGES = ENGLISH + CHINESE


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands(page: Path) -> list[str]:
    """The lines of its bash blocks, and what else it tells to run, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def tables(page: Path) -> list[int]:
    """The rows of each table."""
    return [len(table.strip().splitlines()) for table in re.findall(r"(?:^\|.*\n)+", read(page), re.MULTILINE)]


def test_the_readme_is_read_in_minutes():
    for page in (ROOT / "README.md", ROOT / "README.zh-CN.md"):
        assert read(page).count("\n") <= 120


def test_every_page_is_there_in_both_languages():
    assert [page.name for page in ENGLISH[1:]] == [page.name for page in CHINESE[1:]]


@pytest.mark.parametrize(("english", "chinese"), list(zip(ENGLISH, CHINESE, strict=True)), ids=lambda page: page.name)
def test_languages_are_in_step(english, chinese):
    """The same commands and settings, but for the model's language, and tables of as many rows."""

    def in_english(line: str) -> str:
        return line.replace("bert-base-chinese", "bert-base-uncased").partition("    #")[0].strip()

    assert list(map(in_english, commands(english))) == list(map(in_english, commands(chinese)))
    assert tables(english) == tables(chinese)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for address in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", read(page)):
        assert address.startswith("http") or (page.parent / address).exists(), address


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse_and_name_settings_that_exist(page):
    known = {field.name for kind in (Config, DownstreamConfig) for field in fields(kind)}
    text = read(page)
    told = re.findall(r"(?:python|\./run\.sh)[^`\n]*", text)
    for flag in (flag for line in told if "train.py" in line for flag in re.findall(r"--(\w+)", line)):
        assert flag in known | {"nproc_per_node", "num_processes"}, flag
    for line in re.findall(r"^(?:`\S*`)?(python (?:train|downstream)\.py[^\n`#|]*)$", text, re.MULTILINE):
        program, *flags = shlex.split(line)[1:]
        parse_flags(flags) if program == "train.py" else parse_downstream_flags(flags)
