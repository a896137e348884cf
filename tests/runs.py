"""Runs of the whole job for tests: in this process, forked, or started as a user would; and what they leave."""

import csv
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from markupsafe import Markup
from safetensors.torch import load_file
from transformers import BertForMaskedLM

import data_process
import train
from Config import Config
from mlm.data.micro_batches import MicroBatch, MicroBatcher
from mlm.data.tokenizer import Vocabulary
from mlm.encoder.packed import PackedMaskedLM
from mlm.errors import plain_errors
from mlm.evaluation import loss
from mlm.report.plots import Chart
from mlm.training import step as training_step
from mlm.training.checkpoint import find_checkpoint
from mlm.training.optimizer import make_optimizer
from mlm.training.run import Learner

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


def settings_in(folder: Path, **changes) -> Config:
    """A run of seconds on folder/text, under folder/output."""
    usual = {
        "initial_pretrain_model": "scratch:tiny", "initial_pretrain_tokenizer": "corpus", "vocab_size": 300,
        "path_datasets": str(folder / "text"), "path_model_save": str(folder / "output"), "mixed_precision": "no",
        "tracker": "none", "batch_size": 16, "sen_max_length": 32, "mlm_probability": 0.15, "weight_decay": 0.01,
    }  # fmt: skip
    return Config(**usual | changes)


def long_settings_in(folder: Path, **changes) -> Config:
    """A run with dropout in which reports, evaluations, checkpoints and epochs end at different steps."""
    usual = {"max_steps": 26, "log_every": 3, "eval_every": 4, "save_every": 5}
    usual |= {"attention_dropout": 0.1, "hidden_dropout": 0.1, "micro_batch_tokens": 128}
    return settings_in(folder, **usual | changes)


# ------------------------------------------------------------------------------------------------- in this process


def run(config) -> Path:
    """Trains in this process and returns the run's folder."""
    try:
        train.main(config)
    finally:
        reset_process_state()
    return folder_of(config)


def folder_of(config) -> Path:
    """The folder of the run that `config` names, else of the newest one."""
    output = Path(config.path_model_save)
    if config.run_name:
        return output / config.run_name
    folders = [path for path in output.iterdir() if not path.name.startswith(".")]
    return max(folders, key=lambda path: path.stat().st_mtime)


def stop_at(config, step: int, kind: int = signal.SIGTERM, **how) -> Path:
    """Trains in this process until a signal stops the run in that step, and returns its folder.

    how: as `send_signals` takes it.
    """
    with pytest.MonkeyPatch.context() as patches:
        send_signals(patches, step, kind, **how)
        with pytest.raises(SystemExit) as stopped:
            run(config)
    assert stopped.value.code == 128 + kind
    return folder_of(config)


def send_signals(patches: pytest.MonkeyPatch, step: int, kind: int, times: int = 1, evaluation_batch: int = 0) -> None:
    """Has this process send itself a signal, or several, when it begins the step of that number.

    With `evaluation_batch` it does so in the evaluation after that step instead, as it draws the batch of that number.
    """
    take_step, evaluate, batches = (
        training_step.take_step,
        train.evaluate_and_keep_best,
        data_process.evaluation_batches,
    )
    evaluated = []  # steps done before each evaluation

    def send():
        for _ in range(times):
            os.kill(os.getpid(), kind)

    def watched_step(learner, progress, *others):
        if not evaluation_batch and progress.step + 1 == step:
            send()
        return take_step(learner, progress, *others)

    def watched_evaluation(run, progress):
        evaluated.append(progress.step)
        return evaluate(run, progress)

    def watched_batches(*arguments):
        for number, batch in enumerate(batches(*arguments), start=1):
            if evaluated[-1] == step and number == evaluation_batch:
                send()
            yield batch

    patches.setattr(training_step, "take_step", watched_step)
    patches.setattr(train, "evaluate_and_keep_best", watched_evaluation)
    patches.setattr(data_process, "evaluation_batches", watched_batches)


def reset_process_state() -> None:
    """Makes this process as if it had not trained yet: accelerate keeps its state in classes, a run its signals."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def draw_no_charts(patches: pytest.MonkeyPatch | None = None) -> None:
    """Leaves a run's page without its charts, which take as long as a small run does; tests/report draws them."""
    for name in ("draw_curves", "draw_histogram"):
        replace = (patches or pytest.MonkeyPatch()).setattr
        replace(f"mlm.report.page.{name}", lambda title, *data, **how: Chart(title, Markup(), []))


def score_as(patches: pytest.MonkeyPatch, losses: Iterable[float]) -> None:
    """Has each evaluation find the next of these losses, on two chunks, whatever the model."""
    masked, remaining = np.array([4.0, 6.0]), iter(losses)

    def evaluate(*arguments):
        return loss.Evaluation(next(remaining) * masked, np.array([0.0, 1.0]), masked, np.array([1, 2], np.uint64))

    patches.setattr(loss, "evaluate", evaluate)


def micro_batcher_of(vocabulary: Vocabulary, max_positions: int = 10**6, varlen: bool = False) -> MicroBatcher:
    """One on the CPU, for chunks of at most 32 positions."""
    return MicroBatcher(vocabulary, torch.device("cpu"), varlen, longest_chunk=32, max_positions=max_positions)


def train_on(model: PackedMaskedLM, pieces: list[MicroBatch], masked_tokens: int) -> float:
    """The mean loss of the masked tokens in these micro-batches, whose gradient is in the parameters afterwards."""
    loss = 0.0
    for inputs, wanted in pieces:
        part = F.cross_entropy(model(**inputs), wanted, reduction="sum") / masked_tokens
        part.backward()
        loss += part.item()
    return loss


def learner_of(bert: BertForMaskedLM, vocabulary: Vocabulary) -> Learner:
    """A model that could be trained on the CPU."""
    model = PackedMaskedLM(bert)
    optimizer = make_optimizer(model, "adamw", learning_rate=1e-3, weight_decay=0.0)
    return Learner(Accelerator(), bert, model, optimizer, micro_batcher_of(vocabulary))


# ------------------------------------------------------------------------------------------ started as a user would


def start(config, command=(sys.executable, "train.py"), **environment) -> subprocess.Popen:
    """Starts a command with the flags of `config`; its output is a pipe."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *flags_of(config)], cwd=ROOT, env=os.environ | environment, **pipes)


def flags_of(config) -> list[str]:
    given = {name: value for name, value in asdict(config).items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


# -------------------------------------------------------------------------------------------------------------- forked


class Forked:
    """A process that does some work, forked from one that has imported all, so that it begins at once.

    Used as a subprocess.Popen is; what it writes to stderr is in `stdout` too. For tests of what survives a process, of
    several ranks and of several commands in a row; how a program starts is tested by `start`.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs"])

    def __init__(self, work: Callable, *arguments, **environment: str):
        """work: is called in the process with the arguments; of a module, as it is sent by its name."""
        with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}):
            multiprocessing.forkserver.ensure_running()
        reader, writer = self.context.Pipe(duplex=False)
        self._process = self.context.Process(target=_work, args=(work, arguments, environment, writer))
        self._process.start()
        writer.close()
        self.stdout, self.returncode = os.fdopen(os.dup(reader.fileno()), encoding="utf-8"), None
        reader.close()

    def send_signal(self, kind: int) -> None:
        os.kill(self._process.pid, kind)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 300) -> int:
        """The exit status; below 0 it is a signal."""
        self._process.join(timeout)
        self.returncode = self._process.exitcode
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        out = self.stdout.read()
        self.wait(timeout)
        return out, ""


def _work(work, arguments, environment, output):
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    work(*arguments)


def fork_run(config, before: Callable[[], None] | None = None, **environment: str) -> Forked:
    """Trains; before: is called in the process first."""
    return Forked(_train, config, before, **environment)


def _train(config, before):
    draw_no_charts()
    if before:
        before()
    with plain_errors():
        train.main(config)


def fork_program(
    *command: str, folder: Path = ROOT, before: Callable[[], None] | None = None, **environment: str
) -> Forked:
    """Does what `python COMMAND` does in a folder that holds the project or a copy; before: as of `fork_run`."""
    return Forked(_run_program, command, folder, before, **environment)


def _run_program(command, folder, before):
    os.chdir(folder)
    ours = {"mlm", *(path.stem for path in ROOT.glob("*.py"))}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]  # to be imported from the folder
    of_others = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"))]
    sys.path[:] = [str(folder), *of_others]
    if before:
        before()
    is_module = command[0] == "-m"
    sys.argv = list(command[is_module:])
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str((folder / sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher would tell each of several ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def fork_ranks(config, ranks: int, before: dict[int, Callable[[], None]] | None = None, **environment) -> list[Forked]:
    """The ranks of one run, as a launcher would start them; before: by rank, what is called there first."""
    of_ranks = [environment | each for each in environments(ranks)]
    return [fork_run(config, (before or {}).get(rank), **each) for rank, each in enumerate(of_ranks)]


# ------------------------------------------------------------------------------------------------------- what they say


def finish(process: subprocess.Popen | Forked, status: int = 0) -> tuple[str, str]:
    """Waits for the end, which must have the status; what was written to stdout and stderr, as far as not yet read."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def read_until(process: subprocess.Popen | Forked, *words: str) -> None:
    """Reads the output up to the first line that holds any of the words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if any(each in line for each in words):
            return
    raise AssertionError(f"ended without {words}: {''.join(lines)}{process.communicate()[1]}")


# -------------------------------------------------------------------------------------------------------- what is left


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without its column of speeds."""
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in metrics(folder)]


def weights(folder: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def checkpoints(folder: Path) -> list[int]:
    """The steps of which there are checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08}"


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run is resumed from where nothing changed, and what is said of damaged ones."""
    states = [json.loads((path / "state.json").read_text()) for path in folder.glob("checkpoints/step-*")]
    return find_checkpoint(folder, states[0]["recipe"])


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below the folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_bits(folder: Path, other: Path) -> None:
    """Final and best weights, and metrics.csv but for its speeds."""
    for name in ("final", "best"):
        files = [run / name / "model.safetensors" for run in (folder, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert untimed(folder) == untimed(other)


def assert_close(folder: Path, other: Path, tolerance: float = 1e-5) -> None:
    expected = weights(other)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0, msg=name)
