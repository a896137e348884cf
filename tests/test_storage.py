"""Law 5: nothing is ever half-written. An interruption leaves what was there, or what was to be there, whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import Timeout
from safetensors.numpy import save_file

from mlm.errors import UserError
from mlm.storage import HOST, atomic_write, lock, once, write_csv, write_last_row

ROOT = Path(__file__).parent.parent


def fill(place, content):
    with atomic_write(place) as beside:
        beside.mkdir()
        (beside / "a").write_text(content)
        (beside / "b").write_text(content)


def test_a_folder_is_replaced_whole(tmp_path):
    place = tmp_path / "best"
    fill(place, "first")
    fill(place, "second")
    assert {path.name: path.read_text() for path in place.iterdir()} == {"a": "second", "b": "second"}
    assert list(tmp_path.iterdir()) == [place]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for writer in (ended.pid, os.getpid()):  # in a container one number may be that of every run
        leftover = tmp_path / f".best.{HOST}.{writer}.new"
        leftover.mkdir()
        (leftover / "half").write_text("hal")
    fill(tmp_path / "best", "whole")
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"a", "b"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_another_process_writes_is_left_alone(tmp_path):
    """A process of this machine that is at work, or any of another machine, whose numbers say nothing here."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    others = [tmp_path / f".report.html.{writer}.new" for writer in (f"{HOST}.{os.getppid()}", f"b.{ended.pid}")]
    for other in others:
        other.write_text("hal")
    with atomic_write(tmp_path / "report.html") as temporary:
        temporary.write_text("whole")
    assert [other.read_text() for other in others] == ["hal"] * 2
    assert (tmp_path / "report.html").read_text() == "whole"


@pytest.mark.parametrize("rename_that_fails", [None, 1, 2])
def test_an_interrupted_replacement_keeps_the_old_folder(tmp_path, monkeypatch, rename_that_fails):
    place = tmp_path / "best"
    fill(place, "first")
    renames = []

    def failing(original):
        def rename(self, target):
            renames.append(target)
            if len(renames) == rename_that_fails:
                raise KeyboardInterrupt
            return original(self, target)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    with pytest.raises(KeyboardInterrupt), atomic_write(place) as beside:
        beside.mkdir()
        (beside / "a").write_text("second")
        if rename_that_fails is None:
            raise KeyboardInterrupt  # half filled
    assert {path.name: path.read_text() for path in place.iterdir()} == {"a": "first", "b": "first"}
    assert list(tmp_path.iterdir()) == [place]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "metrics.csv"
    place.write_text("first")
    with pytest.raises(KeyboardInterrupt), atomic_write(place) as beside:
        beside.write_text("sec")
        raise KeyboardInterrupt
    assert place.read_text() == "first" and list(tmp_path.iterdir()) == [place]
    with atomic_write(place) as beside:
        beside.write_text("second")
    assert place.read_text() == "second" and list(tmp_path.iterdir()) == [place]


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "a").write_text("first")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "best"):
        raise KeyboardInterrupt
    assert (tmp_path / "best" / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_of_many_processes_one_makes_and_the_others_wait(tmp_path):
    """Four processes at once; making takes longer than any of them would otherwise need."""
    script = (
        "import os, sys, time; from pathlib import Path; from mlm.storage import once\n"
        "def make(path):\n"
        "    open('made', 'a').write('x'); time.sleep(1); path.write_text('whole')\n"
        "print(once(Path('cache/text'), make).read_text())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert [process.communicate()[0] for process in started] == [b"whole\n"] * 4
    assert (tmp_path / "made").read_text() == "x"


def test_a_maker_that_was_killed_hands_over_to_the_next(tmp_path):
    script = (
        "import time; from pathlib import Path; from mlm.storage import once\n"
        "def make(path):\n"
        "    path.write_text('half'); print(flush=True); time.sleep(60)\n"
        "once(Path('text'), make)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    maker = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    maker.stdout.readline()
    with pytest.raises(Timeout), lock(tmp_path / ".text.lock", timeout_s=0):
        pass
    maker.kill()
    maker.wait()
    assert once(tmp_path / "text", lambda path: path.write_text("whole")).read_text() == "whole"


@pytest.mark.parametrize("loss", ["a part of a file", "a file", "the record", "a part of the record"])
def test_what_has_lost_a_part_is_made_again(tmp_path, loss):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "below").mkdir(parents=True)
        for name in ("a", "below/b"):
            (folder / name).write_text("whole")

    place = tmp_path / "text"
    for _ in range(2):
        assert once(place, make) == place
    assert len(made) == 1
    record = tmp_path / ".text.sizes"
    if loss == "a part of a file":
        (place / "below" / "b").write_text("who")
    elif loss == "a file":
        (place / "a").unlink()
    elif loss == "the record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:-3])
    for _ in range(2):
        assert (once(place, make) / "a").read_text() == (place / "below" / "b").read_text() == "whole"
    assert len(made) == 2


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    """safetensors makes files that their owner alone can read."""
    umask = os.umask(0o077)
    os.umask(umask)
    with atomic_write(tmp_path / "final") as temporary:
        temporary.mkdir()
        save_file({"weight": np.zeros(3)}, temporary / "model.safetensors")
        (temporary / "config.json").write_text("{}")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "final").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_row_is_appended_or_takes_the_place_of_the_last_one(tmp_path):
    """As if the whole file were written each time; also after long rows, and where the file has lost its end."""
    path, columns, rows = tmp_path / "metrics.csv", ("step", "a", "b"), []
    write_csv(path, columns, rows)
    for step in range(300):
        rows.append({"step": step, "a": 10.0**step})
        write_last_row(path, columns, rows[-1], is_new=True)
        if step % 2:
            rows[-1]["b"] = -1e-300
            write_last_row(path, columns, rows[-1], is_new=False)
    written = path.read_bytes()
    write_csv(path, columns, rows)
    assert path.read_bytes() == written
    path.write_text("")
    write_last_row(path, columns, rows[-1], is_new=False)
    assert path.read_text().startswith("299,")
    with pytest.raises(UserError, match="cannot write"):
        write_last_row(tmp_path / "none.csv", columns, rows[-1], is_new=True)
