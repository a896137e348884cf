"""Model folders that any loader of BERT takes, and checkpoints: such a folder and all that a run needs to resume.

A folder named as a checkpoint is whole; what a kill -9 leaves of an unfinished one has another name (mlm/storage.py).
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from Config import Config
from mlm.data.chunks import Corpus
from mlm.data.tokenizer import is_wordpiece
from mlm.data.words import read_words
from mlm.errors import UserError
from mlm.evaluation.loss import load_evaluation, save_evaluation
from mlm.storage import atomic_write, digest, read_csv
from mlm.training.micro_batch_size import is_found_by_trial
from mlm.training.plan import cooldown_start
from mlm.training.progress import EVALUATIONS, Progress
from mlm.training.run import Ending, Learner, Run, Setup
from mlm.training.step import has_finite_weights

FORMAT = 8  # raise when what a checkpoint holds changes

# Settings that may differ when a run is resumed, as they do not change the training but where and how fast it runs and
# what it shows. Text and files of words are compared by what they hold, not by where they lie.
MAY_CHANGE_ON_RESUME = {
    "path_datasets", "text_column", "path_general", "user_words", "add_words", "path_model_save", "run_name",
    "cuda_visible_devices", "compile", "micro_batch_tokens", "log_every", "eval_every", "save_every",
    "keep_checkpoints", "tracker", "check_only", "dry_run", "evaluate_only", "push_to_hub", "resume",
}  # fmt: skip
LENGTHS = {"num_epochs", "max_steps", "num_warmup_steps"}  # which may grow where the learning rate is constant

BEST_MODEL = "best-model.safetensors"  # in the checkpoint before the cool-down, which may leave others in best/
BESIDE_A_MODEL = ("state.json", "manifest.json")  # in a checkpoint


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a plain Hugging Face folder: config, safetensors, tokenizer, and BERT's vocab.txt for older tools."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not is_wordpiece(tokenizer.backend_tokenizer):
        return
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    by_id = (tokens.get(index, f"[unused-id-{index}]") for index in range(max(tokens) + 1))  # a line's number is its id
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in by_id), encoding="utf-8", newline="\n")


def checkpoint_path(run: Path, step: int) -> Path:
    """Returns where the checkpoint of a step is saved in the folder of a run."""
    return run / "checkpoints" / f"step-{step:08}"


def save_if_due(run: Run, progress: Progress, ending: Ending | None) -> None:
    """Saves a checkpoint when the plan says so and it is affordable, and one where the run is stopped or given up."""
    setup, learner, timings = run.setup, run.learner, run.timings
    if not run.is_main or timings.saved_step == progress.step:
        return
    unsaved_s = time.perf_counter() - timings.saved_at
    is_wanted = ending in (Ending.STOPPED, Ending.SKIPPING)
    if ending is None and setup.plan.is_save_due(progress.step):
        is_asked_for = setup.plan.save_every is not None or progress.step == setup.plan.cooldown_from
        is_wanted = is_asked_for or unsaved_s >= timings.affordable_interval_s
    elif ending is None and not setup.plan.save_every and unsaved_s >= timings.longest_interval_s:
        is_wanted = has_finite_weights(learner.bert)
    if not is_wanted:
        return
    if is_found_by_trial(learner.accelerator, setup.config):
        progress.micro_batch_tokens = learner.micro_batcher.max_positions
    with timings.measure("save_checkpoint"):
        save_checkpoint(setup, learner, run.corpus.tokenizer, progress)
    timings.saved_step, timings.saved_at = progress.step, time.perf_counter()


def save_checkpoint(setup: Setup, learner: Learner, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
    """Writes the checkpoint of the step that `progress` has reached, and removes older ones beyond `keep_checkpoints`,
    but for the one from which the run can be extended.

    A plain Hugging Face folder with the optimizer's state beside the weights, evaluations that later ones are compared
    with, state.json (progress, recipe, gradient scaler) and a manifest of every file's size and checksum.
    """
    optimizer = learner.optimizer
    moments = {
        f"{name}/{kind}": tensor
        for name, parameter in learner.bert.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }
    state = {
        "format": FORMAT,
        "progress": progress.state_dict(),
        "recipe": setup.recipe,
        "scaler": optimizer.scaler.state_dict() if optimizer.scaler is not None else None,
    }
    path = checkpoint_path(setup.folder, progress.step)
    with atomic_write(path) as temporary:
        save_model(temporary, learner.bert, tokenizer)
        save_file(moments, temporary / "optimizer.safetensors")
        steps = {"best": progress.best_step, "gained": progress.gained_step}
        for name in EVALUATIONS:
            if evaluation := getattr(progress, name):
                save_evaluation(temporary / f"{name}.safetensors", evaluation, steps.get(name, 0))
        best = setup.folder / "best" / "model.safetensors"
        if progress.best and progress.step == setup.plan.cooldown_from and best.exists():
            shutil.copy(best, temporary / BEST_MODEL)
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {file.name: _measure(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    saved = list_checkpoints(setup.folder)
    not_newer = [step for step in saved if step <= progress.step]
    for step in {*not_newer[: -setup.config.keep_checkpoints]} - {setup.plan.cooldown_from}:
        old = saved[step]
        old.rename(old.with_name(f".{old.name}.old"))  # a removal that is interrupted leaves no half of a checkpoint
    for leftover in path.parent.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def list_checkpoints(run: Path) -> dict[int, Path]:
    """Returns the checkpoints of a run by their steps, the oldest first, damaged ones included."""
    found = {path.name.removeprefix("step-"): path for path in run.glob("checkpoints/step-*")}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdecimal()))


def _measure(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def find_checkpoint(run: Path, recipe: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """Returns a run's newest whole checkpoint, None if it has none at all, and a warning for each damaged newer one.

    Where the recipe, as `make_recipe` returns it, has more steps than the run had, it is the newest from before the
    cool-down, and a line says so. Raises UserError where all are damaged, or the run is finished and not extended.
    """
    said: list[str] = []
    saved, final = list_checkpoints(run), run / "final"
    for step, path in reversed(saved.items()):
        damage = _damage(path)
        if damage:
            said.append(f"warning: {path} is skipped, as {damage}")
            continue
        changes, state = _changes(path, recipe), _read_state(path)
        settings, steps = state["recipe"]["settings"], recipe["settings"]["max_steps"]
        if changes or (steps == settings["max_steps"] and not final.exists()):
            return path, said  # `refuse_changes` says what changed
        if steps == settings["max_steps"]:
            remedy = "a larger num_epochs or max_steps extends it"
            raise UserError(f"resume: {run} is finished; its model is {final}; {remedy}")
        planned = cooldown_start(settings["num_warmup_steps"], settings["max_steps"])
        if step <= (state["progress"]["cooldown_from"] or planned):
            return path, [*said, f"extended to {steps:,} steps, from step {step:,}, before the learning rate fell"]
    if final.exists():
        raise UserError(f"resume: {run} is finished; no checkpoint from before its cool-down is left to extend it from")
    if saved:
        what = f"resume: no checkpoint of {run} is whole; remove them to begin the run anew"
        raise UserError("\n".join([what, *said]))
    return None, []


def _damage(path):
    """Returns what is wrong with a checkpoint, None if it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in ("model.safetensors", "optimizer.safetensors", "state.json", *manifest):
            if _measure(path / name) != manifest[name]:
                return f"{name} is not as manifest.json describes it"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError):
        return "manifest.json is damaged"


def make_recipe(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Returns all that decides a training: its "settings", and digests of its "text", "general" text (None without),
    "tokenizer" and "user_words"."""
    return {
        "settings": asdict(config),
        "text": corpus.text.digest,
        "general": corpus.general.digest if corpus.general else None,
        "tokenizer": digest(corpus.tokenizer.backend_tokenizer.to_str()),
        "user_words": digest(read_words(config.user_words, "user_words")),
    }


def _changes(checkpoint, recipe):
    """Returns what of a recipe forbids to resume a checkpoint: by the name of the setting, how it differs from what the
    run began with."""
    state = _read_state(checkpoint)
    if state.get("format") != FORMAT:
        raise UserError(f"resume: {checkpoint} was written by another version of this program, which can resume it")
    began_with = state["recipe"]
    old_settings, settings = began_with["settings"], recipe["settings"]
    may_change = MAY_CHANGE_ON_RESUME
    if settings["early_stop_evals"]:  # evaluations decide the training
        may_change = may_change - {"eval_every"}
    is_warm = state["progress"]["step"] >= old_settings["num_warmup_steps"]
    if old_settings["schedule"] == "constant" and is_warm and settings["max_steps"] >= old_settings["max_steps"]:
        may_change = may_change | LENGTHS
    changed = {}
    for name in (old_settings.keys() | settings.keys()) - may_change:
        old, new = old_settings.get(name, "no such setting"), settings.get(name, "no such setting")
        if old != new:
            changed[name] = f"{old} when the run began, {new} now"
    if began_with["text"] != recipe["text"]:
        changed["path_datasets"] = "the text is not the one that the run began with"
    elif began_with["tokenizer"] != recipe["tokenizer"]:
        which = "the one that the run began with, or add_words names others"
        changed["initial_pretrain_tokenizer"] = f"the tokenizer is not {which}"
    if began_with["general"] != recipe["general"]:
        changed["path_general"] = "the general text is not the one that the run began with"
    if began_with["user_words"] != recipe["user_words"]:
        changed["user_words"] = "its words are not those that the run began with"
    return changed


def refuse_changes(checkpoint: Path, recipe: dict[str, Any]) -> int:
    """Raises UserError where a recipe, as `make_recipe` returns it, neither is the one that the run began with nor
    extends it; names all that differs. Returns the run's steps of warm-up, which a longer run does not repeat."""
    changed = _changes(checkpoint, recipe)
    if changed:
        named = changed.keys() - {"max_steps", "num_warmup_steps"}  # which mostly change because another setting did
        lines = [f"  {name}: {changed[name]}" for name in sorted(named or changed)]
        remedy = f"Resume it as it began, or begin a new run, perhaps with {checkpoint} as initial_pretrain_model"
        if recipe["settings"]["schedule"] == "linear" and changed.keys() <= LENGTHS:
            remedy += ". One with --schedule constant can be extended later"
        raise UserError("\n".join([f"resume: {checkpoint} cannot be resumed", *lines, remedy]))
    return _read_state(checkpoint)["recipe"]["settings"]["num_warmup_steps"]


def load_checkpoint(path: Path, steps: int, bert: PreTrainedModel, optimizer: AcceleratedOptimizer) -> Progress:
    """Restores the optimizer and its gradient scaler; the weights of `bert` have been loaded from the same folder.

    steps: that the run is to have now. Where they are more than it had, an early stop is forgotten.
    """
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("/")
        parameter = bert.get_parameter(name)
        optimizer.state[parameter][kind] = tensor.to(parameter.device, copy=True)  # not a view of the file
    state = _read_state(path)
    if optimizer.scaler is not None:
        optimizer.scaler.load_state_dict(state["scaler"])
    files = {name: path / f"{name}.safetensors" for name in EVALUATIONS}
    evaluations = {name: load_evaluation(file)[0] for name, file in files.items() if file.exists()}
    progress = Progress.from_state_dict(state["progress"], evaluations)
    if progress.cooldown_from is not None and steps > state["recipe"]["settings"]["max_steps"]:
        progress.cooldown_from, progress.evaluations_without_gain = None, 0
    return progress


def reopen_models(run: Path, checkpoint: Path) -> None:
    """Renames final/ and best/ of a finished run, which goes on from a checkpoint, to final-STEP and best-STEP, by its
    last step; and where the checkpoint has the weights that were best by then, they are in best/ again."""
    if (run / "final").exists():
        last_step = read_csv(run / "metrics.csv")[-1]["step"]
        for name in ("best", "final"):  # without final/ it is not finished any more
            if (run / name).exists():
                shutil.rmtree(run / f"{name}-{last_step}", ignore_errors=True)  # the same training's, of before
                (run / name).rename(run / f"{name}-{last_step}")
    if (checkpoint / BEST_MODEL).exists():
        with atomic_write(run / "best") as temporary:
            shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns("*.safetensors", *BESIDE_A_MODEL))
            shutil.copy(checkpoint / BEST_MODEL, temporary / "model.safetensors")


def _read_state(checkpoint):
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
