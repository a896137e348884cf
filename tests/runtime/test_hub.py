"""Law 8: a Hub out of reach, or without what is asked of it, is said plainly; and checkpoints and text from one.

A stub on loopback serves them, or stays silent, or has never heard of them.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import ROOT
from safetensors.torch import load_file
from texts import make_lines
from transformers import BertConfig, BertForMaskedLM

COMMIT = "0" * 40
PATH = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # where run.sh finds python
pytestmark = pytest.mark.slow


class StubHub(BaseHTTPRequestHandler):
    """Serves server.folder/models/<name>/... and server.folder/datasets/<name>/... the way the Hub does."""

    def do_HEAD(self):
        self.do_GET()

    def parse_request(self):
        parsed = super().parse_request()
        self.requests.append((self.command, self.path))
        return parsed

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        self.asked = self.rfile.read(length).decode()
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
        if match := re.fullmatch(rf"/(?P<kind>datasets/)?{name}/resolve/[\w.-]+/(?P<file>.+)", path):
            repository = self.repository(match)
            file = repository / match["file"]
            if not file.is_file():
                return self.answer(404, {"X-Error-Code": "EntryNotFound" if repository.is_dir() else "RepoNotFound"})
            content = file.read_bytes()
            return self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hash(content):x}"'}, content)
        api = (
            rf"/api/(?P<kind>models|datasets)/{name}(?:/(?P<what>revision|tree|paths-info)/[\w.-]+(?:/(?P<under>.+))?)?"
        )
        match = re.fullmatch(api, path)
        if not match or not self.repository(match).is_dir():
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        folder = self.repository(match)
        entries = [self.entry(folder, path) for path in sorted(folder.rglob("*"))]
        if match["what"] in (None, "revision"):
            siblings = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
            return self.json({"id": match["name"], "sha": COMMIT, "siblings": siblings, "tags": []})
        if match["what"] == "paths-info":
            return self.json([entry for entry in entries if entry["path"] in self.asked])
        inside = [entry for entry in entries if str(Path(entry["path"]).parent) == (match["under"] or ".")]
        return self.json(inside) if inside else self.answer(404, {"X-Error-Code": "EntryNotFound"})

    def entry(self, folder, path):
        kind = "directory" if path.is_dir() else "file"
        return {"type": kind, "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}

    def repository(self, match):
        return self.server.folder / (match["kind"] or "models").strip("/") / match["name"]

    def json(self, content):
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def serve_hub(folder, tokenizer):
    """A stub Hub with a tiny bert-base-uncased and WikiText-2; yields its address."""
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(folder / "models" / "bert-base-uncased")
    tokenizer.save_pretrained(folder / "models" / "bert-base-uncased")
    wikitext = folder / "datasets" / "Salesforce" / "wikitext"
    (wikitext / "wikitext-2-raw-v1").mkdir(parents=True)
    configs = ["configs:", "- config_name: wikitext-2-raw-v1", "  data_files:"]
    for split, number in (("test", 20), ("train", 50)):
        lines = [f" {line} \n" for line in make_lines(number)] + [""]
        pd.DataFrame({"text": lines}).to_parquet(wikitext / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
        configs += [f"  - split: {split}", f"    path: wikitext-2-raw-v1/{split}-*"]
    (wikitext / "README.md").write_text("\n".join(["---", *configs, "---"]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    server.folder, StubHub.requests = folder, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def copy_project(folder):
    """Returns what runs a copy of the project, with empty data and output folders and its own caches."""
    copy = folder / "project"
    copy.mkdir()
    for file in [*ROOT.glob("*.py"), ROOT / "run.sh"]:
        shutil.copy(file, copy)
    shutil.copytree(ROOT / "mlm", copy / "mlm")

    def start(endpoint, *flags, command=(sys.executable, "train.py"), **environment):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), **environment}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        started = time.monotonic()
        result = subprocess.run(
            [*command, *flags], cwd=copy, env=os.environ | environment, capture_output=True, text=True, timeout=120
        )
        return result, time.monotonic() - started

    start.folder = copy
    return start


@pytest.fixture
def hub(tmp_path, tokenizer):
    with serve_hub(tmp_path / "hub", tokenizer) as address:
        yield address


@pytest.fixture
def train(tmp_path):
    return copy_project(tmp_path)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory, tokenizer):
    """What runs a copy of the project in which a first run, my_run, fetched model and text; the Hub; the result."""
    folder = tmp_path_factory.mktemp("fetched")
    with serve_hub(folder / "hub", tokenizer) as hub:
        train = copy_project(folder)
        result, _ = train(hub, "--max_steps", "2", "--sen_max_length", "64", "--run_name", "my_run")
        assert result.returncode == 0, result.stderr
        yield train, hub, result


def test_python_train_py_fetches_the_model_and_wikitext_and_trains(fetched):
    train, _, result = fetched
    assert "fetching WikiText-2" in result.stdout
    lines = (train.folder / "data" / "train.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f" {line} " for line in make_lines(50)] + [""]
    assert (train.folder / "output" / "my_run" / "final" / "model.safetensors").is_file()


def test_what_was_fetched_serves_run_sh_with_no_hub_in_reach_on_a_machine_without_gpu(fetched):
    train, _, _ = fetched
    flags = ["--max_steps", "2", "--sen_max_length", "64", "--run_name", "launched"]
    result, _ = train("http://127.0.0.1:9", *flags, command=["./run.sh"], **PATH)
    assert result.returncode == 0, result.stderr
    saved = json.loads((train.folder / "output" / "launched" / "settings.json").read_text())
    assert saved["derived"]["devices"] == "1 x cpu"


def test_a_model_of_the_hub_is_compared_with_the_one_trained_from_it(fetched):
    train, hub, _ = fetched
    rows = "".join(f"{line}\t{'long' if len(line) > 90 else 'short'}\n" for line in make_lines(80, seed=5))
    (train.folder / "labelled.tsv").write_text(rows, encoding="utf-8")
    flags = ["--task", "labelled.tsv", "--models", "bert-base-uncased", "output/my_run/final", "--frozen"]
    command = (sys.executable, "downstream.py")
    result, _ = train(hub, *flags, command=command)
    assert result.returncode == 0, result.stderr
    assert "my_run: " in result.stdout and "bert-base-uncased" in result.stdout

    # Out of the Hub's reach the cache serves; a name that is not there is said without train.py's ways out.
    result, _ = train("http://127.0.0.1:9", *flags, command=command)
    assert result.returncode == 0, result.stderr
    flags[3] = "bert-large-uncased"
    result, _ = train("http://127.0.0.1:9", *flags, command=command)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "error: models: bert-large-uncased" in result.stderr and "HF_ENDPOINT" in result.stderr


def test_the_hub_is_asked_for_files_and_for_nothing_else(hub, train):
    """A model with weights in PyTorch's format alone is loaded as it is; no conversion of it is asked for."""
    model = train.folder.parent / "hub" / "models" / "bert-base-uncased"
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    result, _ = train(hub, "--max_steps", "1", "--sen_max_length", "64")
    assert result.returncode == 0, result.stderr
    assert any(path.endswith("pytorch_model.bin") for _, path in StubHub.requests)
    information = r"/api/(models|datasets)/[\w.-]+(/[\w.-]+)?(/(tree|revision|paths-info)/.*)?(\?.*)?"
    for method, path in StubHub.requests:
        assert method in ("HEAD", "GET") or "paths-info" in path, path
        assert "/resolve/" in path or re.fullmatch(information, path), path


@pytest.fixture
def silent_hub():
    """Accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("hub_is", ["refusing", "silent", "switched off"])
def test_an_unreachable_hub_is_said_with_the_ways_out(train, silent_hub, hub_is):
    endpoint = {"refusing": "http://127.0.0.1:9", "silent": silent_hub, "switched off": silent_hub}[hub_is]
    if hub_is == "switched off":
        (train.folder / "sitecustomize.py").write_text("import os; os.environ['HF_HUB_OFFLINE'] = '1'")
        result, _ = train(endpoint, PYTHONPATH=str(train.folder))
    else:
        result, _ = train(endpoint)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for way_out in (endpoint, "HF_ENDPOINT", "local folder", "--demo"):
        assert way_out in result.stderr
    assert len(result.stderr.splitlines()) <= 6
    assert not list((train.folder / "data").glob("*")) and not list((train.folder / "output").glob("[!.]*"))


def test_no_text_and_no_hub_asks_for_text(train):
    flags = ["--initial_pretrain_model", "scratch:tiny", "--initial_pretrain_tokenizer", "corpus"]
    result, _ = train("http://127.0.0.1:9", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith("error: path_datasets: data/ holds no text")


def test_an_unknown_name_is_no_network_trouble(hub, train):
    result, _ = train(hub, "--initial_pretrain_model", "someone/bert-bse", "--initial_pretrain_tokenizer", "bert-bse")
    assert result.returncode == 2
    assert "has no model of that name" in result.stderr and "Traceback" not in result.stderr
    assert "HF_ENDPOINT" not in result.stderr


def test_run_sh_says_a_wrong_setting_once_and_helps(train):
    result, _ = train("http://127.0.0.1:9", "--batch_size", "0", command=["./run.sh"], **PATH)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: batch_size: must be greater than or equal to 1, not 0"
    result, _ = train("http://127.0.0.1:9", "--help", command=["./run.sh"], **PATH)
    assert result.returncode == 0 and "--num_epochs" in result.stdout


def test_what_datasets_loads_is_not_counted():
    code = "import mlm.runtime.hub, datasets; print(datasets.config.HF_UPDATE_DOWNLOAD_COUNTS)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == "False\n"
