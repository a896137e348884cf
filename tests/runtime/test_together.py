"""Work shared by processes: all of it is done, by whoever is there, and whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
from runs import ROOT
from turns import TASKS, take_turns

from mlm.errors import UserError
from mlm.runtime import together
from mlm.runtime.together import Place, build_together, count_helpers, do_all, rank_and_ranks


def write_square(task: int, path: Path) -> None:
    path.write_text(str(task * task))


def assert_all_done(folder: Path) -> None:
    assert {path.name: path.read_text() for path in folder.iterdir()} == {str(n): str(n * n) for n in range(TASKS)}


@pytest.mark.parametrize("place", [Place(), Place(0, 3), Place(2, 3), Place(30, 64)])
def test_one_process_does_all_tasks_its_own_first(tmp_path, place):
    done = []
    do_all("", tmp_path / "a", [1] * TASKS, lambda task, path: (done.append(task), write_square(task, path)), place)
    own = list(range(place.number, TASKS, place.places))
    assert done[: len(own)] == own and sorted(done) == list(range(TASKS))
    assert_all_done(tmp_path / "a")


def test_what_is_done_is_not_done_again_and_those_who_help_take_different_tasks(tmp_path):
    for task in range(0, TASKS, 2):
        write_square(task, tmp_path / str(task))
    orders = []
    for number in (2, 3):
        done = []
        do_all(
            "", tmp_path, [1] * TASKS, lambda task, path, done=done: done.append(task) or path.touch(), Place(number, 4)
        )
        orders.append(done)
    assert sorted(orders[0]) == list(range(1, TASKS, 2)) and not orders[1]


def test_results_are_whole_or_absent(tmp_path):
    def fail(task: int, path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        do_all("", tmp_path / "a", [1], fail, Place())
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("a", together.UNFINISHED)]


def test_it_is_told_how_far_all_have_come_in_bytes(tmp_path):
    seen = []
    write_square(1, tmp_path / "1")  # by another process
    do_all("work", tmp_path, [5, 7, 8], write_square, Place(watch=lambda *state: seen.append(state)))
    assert seen == [("work", 12, 20), ("work", 12, 20), ("work", 20, 20)]


def build(folder: Path, place: Place) -> None:
    do_all("", folder / "parts", [1] * TASKS, write_square, place)
    (folder / "whole").mkdir(exist_ok=True)
    (folder / "whole" / "sum").write_text(str(sum(int((folder / "parts" / str(n)).read_text()) for n in range(TASKS))))


@pytest.mark.parametrize("damage", [None, "missing", "shorter", "more"])
def test_a_folder_is_built_once_unless_it_is_damaged(tmp_path, damage):
    builds = []

    def counted(folder, place):
        builds.append(place)
        build(folder, place)

    path = build_together(tmp_path / "text", 0, counted)
    if damage == "missing":
        (path / "sum").unlink()
    elif damage == "shorter":
        (path / "sum").write_text("2")
    elif damage == "more":
        (path / "other").touch()
    assert build_together(path, 0, counted) == path and len(builds) == 1 + bool(damage)
    assert (path / "sum").read_text() == "2470"
    assert [found.name for found in tmp_path.iterdir()] == ["text"]  # and nothing of the parts is left


def test_a_process_that_was_overtaken_takes_what_the_other_made(tmp_path):
    def overtaken(folder, place):
        build(folder, place)
        build_together(tmp_path / "text", 0, build)  # by another process, which removes the parts
        (folder / "parts" / "0").read_text()

    assert (build_together(tmp_path / "text", 0, overtaken) / "sum").read_text() == "2470"


def test_the_place_is_the_launchers_or_slurms(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_ranks() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert rank_and_ranks() == (0, 1)
    monkeypatch.setenv("SLURM_NTASKS", "64")
    assert rank_and_ranks() == (5, 64)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_and_ranks() == (1, 2)


def test_helpers_are_as_many_as_have_a_core_memory_and_enough_to_do(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)}, raising=False)
    memory = Counter(available=1 << 40)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), dict(memory)))
    gigabyte = 1 << 30
    assert [count_helpers(size) for size in (0, 1 << 24, 1 << 25, 1 << 26, gigabyte)] == [0, 0, 1, 2, 7]
    memory["available"] = 3 * gigabyte
    assert count_helpers(gigabyte) == 3
    memory["available"] = 1 << 40
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_helpers(gigabyte) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert count_helpers(gigabyte) == 0


# ---------------------------------------------------------------------------------------------------- other processes


def helpers_of_this_process() -> list[psutil.Process]:
    """Other tests have processes of their own, which stay."""
    return [child for child in psutil.Process().children() if "mlm.runtime.together" in child.cmdline()]


@pytest.fixture
def two_helpers(monkeypatch):
    monkeypatch.setattr(together, "count_helpers", lambda text_bytes: 2)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.mark.slow
def test_helpers_do_their_part_and_end_with_the_work(tmp_path, two_helpers):
    path = build_together(tmp_path / "text", 0, partial(take_turns, 0.5, None))
    workers = Counter(int((path / str(task)).read_text()) for task in range(TASKS))
    assert len(workers) > 1 and os.getpid() in workers
    assert not helpers_of_this_process()


@pytest.mark.slow
def test_what_a_helper_refuses_is_said_and_ends_the_work(tmp_path, two_helpers):
    with pytest.raises(UserError, match=r"^task 1 is wrong$"):
        build_together(tmp_path / "text", 0, partial(take_turns, 1.0, 1))
    assert not helpers_of_this_process()


@pytest.mark.slow
def test_a_helper_that_is_killed_leaves_its_part_to_the_others(tmp_path, two_helpers, capsys):
    killed = []

    def work(folder, place):
        def kill(*state):
            if not killed:
                killed.append(helpers_of_this_process()[0])
                killed[0].kill()
                while killed[0].status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)

        do_all("", folder / "whole", [1] * TASKS, write_square, Place(place.number, place.places, kill))
        place.watch("", 0, 0)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(together.pickle, "dump", lambda content, to: to.write(IDLE))
        path = build_together(tmp_path / "text", 0, work)
    assert len(list(path.glob("[0-9]*"))) == TASKS
    assert "ended with status -9; the others do its part" in capsys.readouterr().out


IDLE = together.pickle.dumps((time.sleep, 60, None, None))

KILLED = """
import sys; from functools import partial; from pathlib import Path
from mlm.runtime import together
from turns import take_turns
together.count_helpers = lambda text_bytes: 2
together.build_together(Path(sys.argv[1]), 0, partial(take_turns, 1.0, None))
"""


@pytest.mark.slow
def test_helpers_end_with_the_process_that_they_help(tmp_path):
    paths = [str(ROOT), str(ROOT / "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "text"], env=environment)
    helpers = []
    while len(helpers) < 2:
        time.sleep(0.05)
        assert process.poll() is None
        helpers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(helpers, timeout=60)
    assert not alive


RANKS = """
import os, sys, time; from pathlib import Path
from mlm.runtime.together import Place, build_together, do_all
def work(folder, place):
    do_all("", folder / "parts", [1] * 30, lambda task, path: path.write_text(str(task)), place)
    found = sorted((folder / "parts").glob("[0-9]*"))
    (folder / "whole").mkdir(exist_ok=True)
    do_all("", folder / "whole", [1] * 30, lambda task, path: path.write_text(found[task].read_text()), place)
start = Path(sys.argv[1])
while not (start / "go").exists():
    pass
for number in range(20):
    build_together(start / f"text{number}", 0, work)
"""


@pytest.mark.slow
def test_ranks_that_build_the_same_at_the_same_time_get_in_nobodys_way(tmp_path):
    """Each ends wherever another removes what it is reading."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, tmp_path],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "3"},
        )
        for rank in range(3)
    ]
    (tmp_path / "go").touch()
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"go", *(f"text{number}" for number in range(20))}


@pytest.mark.slow
def test_ranks_that_prepare_the_same_text_at_the_same_time_make_the_same_of_it(tmp_path, settings, tokenizer):
    """Twenty texts in a row, each by three ranks that begin together and overtake each other."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = settings()
    script = PREPARING.format(folder=config.path_datasets, output=config.path_model_save)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "3"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    while len(list(tmp_path.glob("ready*"))) < 3:
        time.sleep(0.05)
        assert all(process.poll() is None for process in processes)
    (tmp_path / "go").touch()
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    cache = Path(config.path_model_save) / ".cache"
    assert len(list(cache.glob("text-*"))) == 20 and not list(cache.glob(".*.parts"))


PREPARING = """
import os, sys; from pathlib import Path
from transformers import AutoTokenizer
from Config import Config
from data_process import prepare
from mlm.data.tokenizer import read_vocabulary
from mlm.text import units
from mlm.text.files import find_text
units.SMALLEST_UNIT_BYTES = 4000
start = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(start / "tokenizer")
(start / ("ready" + os.environ["RANK"])).touch()
while not (start / "go").exists():
    pass
for seed in range(20):
    config = Config(path_datasets={folder!r}, path_model_save={output!r}, seed=seed, sen_max_length=10 + seed)
    prepare(config, find_text(config), tokenizer, read_vocabulary(tokenizer))
"""
