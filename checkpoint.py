"""Checkpoints: all that a run needs to go on as if it had never stopped. A folder named as one is whole."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, PreTrainedTokenizerBase

from Config import Config, UserError
from model import save_model
from storage import whole

FORMAT = 2  # raise when what a checkpoint holds changes

# What a run may go on with changed: it decides where and how fast the run goes and what it shows, not its training.
# What the text and the files of words hold has digests of its own, wherever they lie.
FREE = {
    "path_datasets", "user_words", "add_words", "path_model_save", "run_name", "cuda_visible_devices", "compile",
    "micro_batch_tokens", "log_every", "eval_every", "save_every", "keep_checkpoints", "tracker", "check_only",
    "resume",
}  # fmt: skip


@dataclass
class Progress:
    """How far a run has come; with the weights and the optimizer's state, all that it goes on from."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # the last step after which the model was evaluated; -1: not even the start was
    rows: list[dict] = field(default_factory=list)  # of metrics.csv
    unreported: Counter = field(default_factory=Counter)  # loss, masked_tokens, tokens, seconds, steps since a row
    best_loss: float | None = None  # the lowest test loss in training
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_a_row: int = 0
    guesses_before: list[str] = field(default_factory=list)  # the starting checkpoint's, for the closing words

    def __post_init__(self):
        self.unreported = Counter(self.unreported)


def find_run(config: Config) -> Path:
    """The folder of the run to resume: the one that `run_name` names, or the newest unfinished one.

    A name of none yet is that of a run to begin, so that one command serves to begin and to go on. Raises UserError
    where there is none to resume, or it is finished.
    """
    output = Path(config.path_model_save)
    if config.run_name:
        folder = output / config.run_name
        if (folder / "final").exists():
            raise UserError(f"resume: {folder} is finished; its model is {folder / 'final'}")
        if folder.exists() and not (folder / "settings.json").exists():
            raise UserError(f"resume: {folder} is not the folder of a run; choose another run_name")
        return folder
    runs = [path.parent for path in output.glob("*/settings.json") if not (path.parent / "final").exists()]
    if not runs:
        raise UserError(f"resume: {output} holds no unfinished run; leave --resume out to begin one")
    return max(runs, key=lambda folder: folder.stat().st_mtime)


def save_checkpoint(
    run: Path,
    bert: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: AcceleratedOptimizer,
    progress: Progress,
    recipe: dict,
    keep: int,
) -> Path:
    """Writes `run`/checkpoints/step-N and removes all but the `keep` newest; returns its path.

    A plain Hugging Face folder with the optimizer's state beside the weights, state.json (progress, recipe, gradient
    scaler) and a manifest of every file's size and checksum. For the recipe see `refuse_changes`.
    """
    moments = {
        f"{name}/{kind}": tensor
        for name, parameter in bert.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }
    scaler = optimizer.scaler and optimizer.scaler.state_dict()
    state = {"format": FORMAT, "progress": vars(progress), "recipe": recipe, "scaler": scaler}
    path = run / "checkpoints" / f"step-{progress.step:08}"
    with whole(path) as beside:
        save_model(beside, bert, tokenizer)
        save_file(moments, beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {file.name: _measure(file) for file in sorted(beside.iterdir())}
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for old in [other for other in _checkpoints(run) if _step(other) <= progress.step][:-keep]:
        old.rename(old.with_name(f".{old.name}.old"))  # a removal that is interrupted leaves no half of a checkpoint
    for leftover in path.parent.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return path


def _checkpoints(run):
    """The oldest first, damaged ones included."""
    return sorted((path for path in run.glob("checkpoints/step-*") if path.name[5:].isdecimal()), key=_step)


def _step(path):
    return int(path.name[5:])


def _measure(file):
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, None if it has none at all, and a warning for each damaged newer one.

    Raises UserError where all are damaged.
    """
    warnings = []
    for path in reversed(_checkpoints(run)):
        damage = _damage(path)
        if not damage:
            return path, warnings
        warnings.append(f"warning: {path} is passed over, as {damage}")
    if warnings:
        raise UserError(
            "\n".join([f"resume: no checkpoint of {run} is whole; remove them to begin it anew", *warnings])
        )
    return None, []


def _damage(path):
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in ("model.safetensors", "optimizer.safetensors", "state.json", *manifest):
            if _measure(path / name) != manifest[name]:
                return f"{name} is not as manifest.json describes it"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError):
        return "manifest.json is damaged"


def refuse_changes(checkpoint: Path, recipe: dict) -> None:
    """Raises UserError, which names all that decides the training and is not as it was when the run began.

    recipe: the resolved "settings", and a digest each of "text", "tokenizer" and "user_words".
    """
    state = _read_state(checkpoint)
    if state.get("format") != FORMAT:
        raise UserError(f"resume: {checkpoint} was written by another version of this program, which can go on with it")
    then = state["recipe"]
    changed = {}
    for name in (then["settings"].keys() | recipe["settings"].keys()) - FREE:
        old, new = (settings.get(name, "no such setting") for settings in (then["settings"], recipe["settings"]))
        if old != new:
            changed[name] = f"{old} when the run began, {new} now"
    if then["text"] != recipe["text"]:
        changed["path_datasets"] = "the text is not the one that the run began with"
    elif then["tokenizer"] != recipe["tokenizer"]:
        changed["initial_pretrain_tokenizer"] = (
            "the tokenizer is not the one that the run began with, or add_words names others"
        )
    if then["user_words"] != recipe["user_words"]:
        changed["user_words"] = "its words are not those that the run began with"
    chosen = changed.keys() - {"max_steps", "num_warmup_steps"} or changed  # which most often follow from the others
    if changed:
        lines = [f"  {name}: {changed[name]}" for name in sorted(chosen)]
        remedy = f"Resume it as it began, or begin a new run, perhaps with {checkpoint} as initial_pretrain_model"
        raise UserError("\n".join([f"resume: {checkpoint} cannot be gone on from", *lines, remedy]))


def load_checkpoint(path: Path, bert: BertForMaskedLM, optimizer: AcceleratedOptimizer) -> Progress:
    """Restores the optimizer and its gradient scaler; the weights of `bert` have been loaded from the same folder."""
    parameters = dict(bert.named_parameters())
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = tensor.to(parameter.device, copy=True)  # not a view of the file
    state = _read_state(path)
    if optimizer.scaler is not None:
        optimizer.scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def _read_state(checkpoint):
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
