"""How far a run has come: with the weights and the optimizer's state, all that survives a kill."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlm.evaluation.fill_mask import Guess
from mlm.evaluation.loss import Evaluation

# Fields of `Progress` whose arrays have files of their own.
EVALUATIONS = ("baseline", "general_baseline", "best", "gained")


@dataclass
class SinceLastLog:
    """What was done since the last line in the log."""

    steps: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # summed over masked tokens, of all ranks, in nats
    masked_tokens: int = 0
    tokens: int = 0


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    last_evaluated_step: int = -1  # -1: not even the baseline was evaluated
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.csv
    since_last_log: SinceLastLog = field(default_factory=SinceLastLog)
    best: Evaluation | None = None  # that with the lowest loss in training, on the sampled chunks
    best_step: int = 0  # of it
    gained: Evaluation | None = None  # the last that was surely better than the one in this place before it
    gained_step: int = 0  # of it; 0: the baseline's
    evaluations_without_gain: int = 0  # in a row, since then
    cooldown_from: int | None = None  # the step after which an early stop began it
    skipped_steps: int = 0  # without a finite loss and gradient
    skipped_in_a_row: int = 0
    baseline: Evaluation | None = None  # of the model before training, which later ones are compared with
    general_baseline: Evaluation | None = None  # the same on general text, where there is such
    sampled_chunks: int = 0  # of the test text, which evaluations between the first and the last score
    baseline_guesses: list[list[Guess]] = field(default_factory=list)  # for the hidden words, before training
    micro_batch_tokens: int | None = None  # what was found to fit a GPU's memory

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the evaluations, whose arrays have files of their own, as JSON takes it."""
        state = asdict(replace(self, baseline=None, general_baseline=None, best=None, gained=None))
        return {name: value for name, value in state.items() if name not in EVALUATIONS}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], evaluations: dict[str, Evaluation]) -> "Progress":
        """Returns what `state_dict` was made of, after JSON; evaluations: by their names here."""
        guesses = [[Guess(*guess) for guess in guesses] for guesses in state["baseline_guesses"]]
        restored = {"since_last_log": SinceLastLog(**state["since_last_log"]), "baseline_guesses": guesses}
        return cls(**state | restored | evaluations)
