"""How long a run trains and at what learning rate: the settings, each with the value that it stands for."""

from dataclasses import dataclass
from typing import Any

from Config import SCRATCH_SIZES, Config
from mlm.data.text_files import text_folder
from mlm.errors import UserError


@dataclass(kw_only=True)
class ResolvedConfig(Config):
    """A configuration in which settings that were left unset have the value that they stand for.

    Two may stay unset: `micro_batch_tokens`, which the device decides, and `save_every`, as checkpoints
    at the ends of epochs alone are saved only as often as costs little. Defaults stay those of Config.
    """

    max_steps: int
    num_warmup_steps: float  # a count
    learning_rate: float
    eval_every: int


def resolve(config: Config, steps_per_epoch: int, precision: str) -> ResolvedConfig:
    """The configuration for a text of so many steps per epoch, in the number format that forward passes will have.

    Raises UserError where settings do not fit together.
    """
    total_steps = config.max_steps or config.num_epochs * steps_per_epoch
    warmup_steps = config.num_warmup_steps
    if warmup_steps < 1:  # a share of all steps
        warmup_steps = round(warmup_steps * total_steps)
    if warmup_steps > total_steps:
        raise UserError(f"num_warmup_steps: {warmup_steps:g} is more than the {total_steps} steps of num_epochs")
    usual_rate = SCRATCH_SIZES[config.scratch_size].learning_rate if config.scratch_size else 3e-5
    resolved: dict[str, Any] = {
        "path_datasets": str(text_folder(config)),
        "max_steps": total_steps,
        "num_warmup_steps": warmup_steps,
        "learning_rate": config.learning_rate or usual_rate,
        "eval_every": config.eval_every or steps_per_epoch,
        "mixed_precision": precision,
    }
    return ResolvedConfig(**(vars(config) | resolved))


def learning_rate_at(step: int, config: ResolvedConfig) -> float:
    """Linear warm-up to `learning_rate`, then linear decay; above 0 in the first step and in the last.

    step: optimizer steps done before.
    """
    warmup, total = int(config.num_warmup_steps), config.max_steps
    of_peak = (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)
    return config.learning_rate * of_peak
