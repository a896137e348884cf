"""What README.md and docs/ say: in English and in Chinese the same, and commands that are ones."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from runs import finish, fork_program
from texts import write_text

from Config import Config, DownstreamConfig, parse_downstream_flags, parse_flags

ROOT = Path(__file__).parent.parent
ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs" / "zh-CN").glob("*.md"))]
PAGES = ENGLISH + CHINESE
FLAGS_OF_OTHERS = {
    "accelerate": {"num_processes"},
    "hf": {"local-dir"},
    "pip": {"index-url"},
    "sbatch": {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue", "wrap"},
    "tensorboard": {"logdir"},
    "torchrun": {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
    | {"rdzv_id", "rdzv_backend", "rdzv_endpoint"},
}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks: language and content."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```\w+\n.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def tables(page: Path) -> list[list[str]]:
    """The tables: of each the first cells of its rows, the heading's first."""
    found, inside = [], False
    for line in prose(page).splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append(re.split(r"(?<!\\)\|", line)[1].strip())
        inside = line.startswith("|")
    return found


def commands(page: Path, program: str) -> list[list[str]]:
    """The arguments of every `python PROGRAM ...` on a page, in blocks and between backticks."""
    in_blocks = [content.replace("\\\n", " ") for language, content in blocks(page) if language == "bash"]
    in_lines = re.findall(r"`([^`\n]+)`", prose(page))
    found = []
    for line in [*"\n".join(in_blocks).splitlines(), *in_lines]:
        found += [shlex.split(arguments) for arguments in re.findall(rf"\bpython {program}([^&|;]*)", line)]
    return found


def test_the_readme_can_be_read_in_one_go():
    assert len(read(ROOT / "README.md").splitlines()) <= 120
    for page in PAGES:  # but for tables and links, which cannot be broken
        for line in read(page).splitlines():
            assert len(line) <= 120 or line.startswith("|"), f"{name_of(page)}: {line}"


def test_the_first_two_commands_are_those_that_ci_runs():
    for page in (ROOT / "README.md", ROOT / "README.zh-CN.md"):
        first, second = [content.strip() for language, content in blocks(page) if language == "bash"][:2]
        assert first == "pip install -r requirement.txt && python train.py --demo"
        assert second == "pip install -r requirement-dev.txt && pytest"


def test_both_languages_have_the_same_pages():
    assert [page.name for page in ENGLISH[1:]] == [page.name for page in CHINESE[1:]]
    assert len(ENGLISH) >= 9


@pytest.mark.parametrize(("english", "chinese"), list(zip(ENGLISH, CHINESE, strict=True)), ids=name_of)
def test_both_languages_have_the_same_blocks_tables_and_headings(english, chinese):
    ours, theirs = blocks(english), blocks(chinese)
    assert [language for language, _ in ours] == [language for language, _ in theirs]
    for (language, content), (_, other) in zip(ours, theirs, strict=True):
        if language == "bash":
            assert content == other
        elif language == "python":  # a model's name and a sentence may be of the language
            assert _without_words(content) == _without_words(other)
        else:
            assert content.count("\n") == other.count("\n")
    assert [[_code(cell) for cell in table] for table in tables(english)] == [
        [_code(cell) for cell in table] for table in tables(chinese)
    ]
    levels = [re.findall(r"^(#+) ", prose(page), re.MULTILINE) for page in (english, chinese)]
    assert levels[0] == levels[1]


def _without_words(code: str) -> str:
    return re.sub(r'"[^"]*"|#.*', "", code)


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert links
    for link in links:
        file, _, place = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if place:
            headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", read(target), flags=re.M | re.S), re.M)
            assert place in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_are_settings_or_those_of_other_programs(page):
    ours = {field.name for settings in (Config, DownstreamConfig) for field in fields(settings)}
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", read(page)))
    assert flags - ours - {"resume"} <= set().union(*FLAGS_OF_OTHERS.values())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page):
    for arguments in commands(page, "train.py"):
        assert isinstance(parse_flags(arguments), Config)
    for arguments in commands(page, "downstream.py"):
        assert parse_downstream_flags(arguments).models


def test_commands_are_found():
    found = [tuple(arguments) for page in ENGLISH for arguments in commands(page, "train.py")]
    for arguments in ([], ["--demo"], ["--dry_run"], ["--resume"], ["--whole_words_mask"]):
        assert tuple(arguments) in found
    assert any(arguments[:1] == ("--evaluate_only",) for arguments in found)
    assert any(commands(page, "downstream.py") for page in ENGLISH)


@pytest.mark.slow
def test_commands_that_need_no_network_run(tmp_path):
    """Each as a page has it; defaults that would fetch a model, or train for long, are changed in Config.py."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "mlm", tmp_path / "mlm", ignore=shutil.ignore_patterns("__pycache__"))
    write_text(tmp_path / "data")
    source = read(tmp_path / "Config.py")
    for setting, value in {
        "initial_pretrain_model: Name": '"scratch:tiny"',
        "initial_pretrain_tokenizer: Name": '"corpus"',
        "vocab_size: VocabularySize": "300",
        "max_steps: Count | None": "30",
        "save_every: Count | None": "5",
        "tracker: Name": '"none"',
    }.items():
        source, changed = re.subn(rf"(    {re.escape(setting)} = ).+?(?=  #)", rf"\g<1>{value}", source)
        assert changed == 1, setting
    (tmp_path / "Config.py").write_text(source, encoding="utf-8")
    dry_run = tmp_path / "mlm" / "report" / "dry_run.py"
    dry_run.write_text(read(dry_run).replace("TIMED_SECONDS = 15.0", "TIMED_SECONDS = 0.1"), encoding="utf-8")

    def arguments(documented: str) -> list[str]:
        pages = "\n".join(read(page).replace("\\\n    ", "") for page in ENGLISH)
        assert re.search(rf"{re.escape(documented)}(?=[`\n])", pages), documented
        return shlex.split(documented)[1:]

    def run(documented: str, *more: str) -> str:
        return finish(fork_program(*arguments(documented), *more, folder=tmp_path))[0]

    output = tmp_path / "output"
    assert "all thrown away" in run("python train.py --dry_run")
    assert [path.name for path in output.iterdir()] == [".cache"]

    run("python train.py", "--run_name", "my_run")
    shutil.copytree(output / "my_run", output / "a")
    shutil.rmtree(output / "my_run" / "final")  # so that it looks like a run that stopped
    assert "resumed from" in run("python train.py --resume", "--run_name", "my_run")
    shutil.copytree(output / "my_run", output / "b")

    (tmp_path / "data" / "train.txt").unlink()
    model = "output/my_run/final"
    scored = run(
        f"python train.py --evaluate_only --initial_pretrain_model {model} --initial_pretrain_tokenizer {model}"
    )
    assert "Not trained" in scored

    command = [sys.executable, *arguments("python -m mlm.report output/my_run")]  # which no other test starts
    assert "report.html" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "report-of-2-runs.html" in run("python -m mlm.report output/a output/b")
    assert (output / "report-of-2-runs.html").exists()
