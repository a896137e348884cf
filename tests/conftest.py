"""A tiny corpus in English and Chinese with emoji, a tokenizer learned from it, and no way to the network.

`whole` is a run that nothing interrupted, trained once for all tests that compare an interrupted one with it.
"""

import os
from functools import partial
from pathlib import Path

# One thread: models this small are slower with more, and far slower beside other work.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "ACCELERATE_USE_CPU": "true"}
os.environ |= {"OMP_NUM_THREADS": "1"}

import pytest
from runs import draw_no_charts, long_settings_in, reset_process_state, run, settings_in
from texts import make_lines, write_text

from mlm.data.tokenizer import learn_tokenizer, read_vocabulary
from mlm.report.summary import read_summary
from mlm.text.files import Text, find_text


@pytest.fixture(scope="session")
def tokenizer():
    return learn_tokenizer(lambda: iter(make_lines(400)), 300)


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    return read_vocabulary(tokenizer)


@pytest.fixture
def text_folder(tmp_path):
    return write_text(tmp_path / "text")


@pytest.fixture
def settings(tmp_path, text_folder):
    """Makes a Config for a run of seconds; keyword arguments change it."""
    return partial(settings_in, tmp_path)


@pytest.fixture
def long_settings(tmp_path, text_folder):
    """Makes a Config for a run worth interrupting; keyword arguments change it."""
    return partial(long_settings_in, tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run of `long_settings` that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "text")
    return run(long_settings_in(folder, run_name="whole"))


@pytest.fixture(scope="session")
def finished(whole):
    """The summary of `whole`."""
    return read_summary(whole)


@pytest.fixture(scope="module")
def module_settings(tmp_path_factory):
    """`long_settings` for a run that the tests of a module share; each takes a copy of what it left."""
    folder = tmp_path_factory.mktemp("shared")
    write_text(folder / "text")
    return partial(long_settings_in, folder)


@pytest.fixture
def text_of():
    """Writes lines or bytes to one file a split and returns them as a Text."""

    def make(folder: Path, train: bytes, test: bytes = b"a test line\n") -> Text:
        for split, content in (("train", train), ("test", test)):
            (folder / f"{split}.txt").write_bytes(content)
        return find_text(settings_in(folder, path_datasets=str(folder)))

    return make


@pytest.fixture(autouse=True)
def fresh_process_state():
    """A run in a test must not see what the last one left in this process."""
    yield
    reset_process_state()


@pytest.fixture(autouse=True)
def charts(monkeypatch):
    """A run in a test draws none, but for those of tests/report."""
    draw_no_charts(monkeypatch)
