"""Nothing is ever half-written: an interruption leaves what was there, or what was to be there, whole."""

import os
from pathlib import Path

import pytest

from storage import whole


def fill(place, content):
    with whole(place) as beside:
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
    leftover = tmp_path / f".best.{os.getpid()}.new"
    leftover.mkdir()
    (leftover / "half").write_text("hal")
    fill(tmp_path / "best", "whole")
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"a", "b"}


@pytest.mark.parametrize("rename_that_fails", [None, 1, 2])
def test_an_interrupted_replacement_keeps_the_old_folder(tmp_path, monkeypatch, rename_that_fails):
    place = tmp_path / "best"
    fill(place, "first")
    rename, renames = Path.rename, []

    def failing(self, target):
        renames.append(target)
        if len(renames) == rename_that_fails:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt), whole(place) as beside:
        beside.mkdir()
        (beside / "a").write_text("second")
        if rename_that_fails is None:
            raise KeyboardInterrupt  # half filled
    assert {path.name: path.read_text() for path in place.iterdir()} == {"a": "first", "b": "first"}
    assert list(tmp_path.iterdir()) == [place]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "metrics.csv"
    place.write_text("first")
    with pytest.raises(KeyboardInterrupt), whole(place) as beside:
        beside.write_text("sec")
        raise KeyboardInterrupt
    assert place.read_text() == "first" and list(tmp_path.iterdir()) == [place]
    with whole(place) as beside:
        beside.write_text("second")
    assert place.read_text() == "second" and list(tmp_path.iterdir()) == [place]
