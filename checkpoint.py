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

# What a run may go on with changed: it decides where and how fast the run goes and what it shows, not its training.
# The text has its own digest, wherever it lies.
FREE = {
    "path_datasets", "path_model_save", "run_name", "cuda_visible_devices", "micro_batch_tokens", "log_every",
    "eval_every", "save_every", "keep_checkpoints", "tracker", "check_only", "resume",
}  # fmt: skip


@dataclass
class Progress:
    """How far a run has come; with the weights and the optimizer's state, all that it goes on from."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # the last step after which the model was evaluated; -1: not even the start was
    rows: list[dict] = field(default_factory=list)  # of metrics.csv
    unreported: Counter = field(default_factory=Counter)  # loss, masked_tokens, tokens, seconds, steps since a row
    best_loss: float | None = None  # the lowest test loss in training
    skipped_in_a_row: int = 0  # steps without a finite loss and gradient
    guesses_before: list[str] = field(default_factory=list)  # the starting checkpoint's, for the closing words

    def __post_init__(self):
        self.unreported = Counter(self.unreported)


def find_run(config: Config) -> Path:
    """The folder of the run to resume: the one that `run_name` names, or the newest unfinished one.

    Raises UserError where there is none, or it is finished.
    """
    output = Path(config.path_model_save)
    if config.run_name:
        folder = output / config.run_name
        if (folder / "final").exists():
            raise UserError(f"resume: {folder} is finished; its model is {folder / 'final'}")
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
    state = {"progress": vars(progress), "recipe": recipe, "scaler": scaler}
    path = run / "checkpoints" / f"step-{progress.step:08}"
    with whole(path) as beside:
        save_model(beside, bert, tokenizer)
        save_file(moments, beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {file.name: _measure(file) for file in sorted(beside.iterdir())}
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for old in sorted(path.parent.glob("step-*"))[:-keep]:
        old.rename(old.with_name(f".{old.name}.old"))  # a removal that is interrupted leaves no half of a checkpoint
    for leftover in path.parent.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return path


def _measure(file):
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, None if it has none at all, and a warning for each damaged newer one.

    Raises UserError where all are damaged.
    """
    warnings = []
    for path in sorted(run.glob("checkpoints/step-*"), reverse=True):
        damage = _damage(path)
        if not damage:
            return path, warnings
        warnings.append(f"warning: {path} is passed over, as {damage}")
    if warnings:
        raise UserError("\n".join([f"resume: no checkpoint of {run} is whole", *warnings]))
    return None, []


def _damage(path):
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            found = _measure(path / name)
            for kind in ("bytes", "sha256"):
                if found[kind] != expected[kind]:
                    return f"{name} has {kind} {found[kind]} where manifest.json says {expected[kind]}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"it cannot be read: {error}"


def refuse_changes(checkpoint: Path, recipe: dict) -> None:
    """Raises UserError, which names all that decides the training and is not as it was when the run began.

    recipe: the resolved "settings", and a digest each of "text" and "tokenizer".
    """
    then = _read_state(checkpoint)["recipe"]
    changed = [
        f"  {name}: {value} when the run began, {recipe['settings'][name]} now"
        for name, value in then["settings"].items()
        if name not in FREE and recipe["settings"][name] != value
    ]
    for part, setting in (("text", "path_datasets"), ("tokenizer", "initial_pretrain_tokenizer")):
        if then[part] != recipe[part]:
            changed.append(f"  {setting}: the {part} is not the one that the run began with")
    if changed:
        remedy = f"Put it back, or begin a new run, perhaps with {checkpoint} as initial_pretrain_model"
        raise UserError("\n".join([f"resume: {checkpoint} cannot be gone on from", *changed, remedy]))


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
