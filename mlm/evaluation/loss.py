"""How good a model is: its loss on each chunk of the test text, so that every figure has its standard error."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.stats import t as student_t
from torch import Tensor, nn

from mlm.data.micro_batches import MicroBatcher
from mlm.data.packing import Sequences
from mlm.runtime import heartbeat
from mlm.runtime.hardware import OutOfMemory, detect_out_of_memory
from mlm.runtime.signals import Stopped, StopRequest
from mlm.storage import atomic_write
from mlm.terminal import progress_bar, say


class Evaluation(NamedTuple):
    """A model on n chunks of text, masked by BERT's rule at 15% with masks that depend on the text alone."""

    losses: np.ndarray  # (n,) float64: nats, summed over a chunk's masked tokens
    correct: np.ndarray  # (n,) float64: masked tokens whose most likely guess is right
    masked: np.ndarray  # (n,) float64: masked tokens, at least one
    lines: np.ndarray  # (n,) uint64: which line a chunk is from; text is drawn by lines, and equal lines are one

    @property
    def loss(self) -> float:
        """Nats per masked token."""
        return float(self.losses.sum() / self.masked.sum())

    @property
    def loss_se(self) -> float:
        """The standard error of `loss`, for more text of this kind."""
        return standard_error(*sum_by_line(self.lines, self.losses, self.masked))

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def perplexity_se(self) -> float:
        """The standard error of `perplexity`, by the delta method."""
        return self.perplexity * self.loss_se

    @property
    def accuracy(self) -> float:
        """The share of masked tokens whose most likely guess is right."""
        return float(self.correct.sum() / self.masked.sum())

    def first(self, chunks: int) -> "Evaluation":
        """The part of it on the first so many chunks."""
        return Evaluation(*(of_chunks[:chunks] for of_chunks in self))


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats."""
    return math.exp(min(loss, 700.0))  # exp of more overflows a float


def sum_by_line(lines: np.ndarray, *of_chunks: np.ndarray) -> list[np.ndarray]:
    """Sums what chunks (n,) have over those of the same of `lines` (n,): for each array another, (different lines,)."""
    _, line = np.unique(lines, return_inverse=True)
    return [np.bincount(line, weights=values) for values in of_chunks]


def standard_error(sums: np.ndarray, counts: np.ndarray) -> float:
    """The standard error of sums.sum() / counts.sum(), where each line (n,) was drawn by itself; infinite for one. The
    ratio estimator's, with lines as clusters of tokens (Cochran, Sampling Techniques, 3rd edition, 6.3 and 9A.1)."""
    n = len(sums)
    if n < 2:
        return math.inf
    residuals = sums - sums.sum() / counts.sum() * counts  # (n,) of the mean
    return float(math.sqrt(n / (n - 1) * (residuals @ residuals)) / counts.sum())


class Change(NamedTuple):
    """How a model's loss differs from another's on the same chunks, with the same masks."""

    loss: float  # nats per masked token; below 0 it fell
    se: float  # its standard error, over lines of text
    low: float  # of the 95% interval
    high: float


def compare(before: Evaluation, after: Evaluation, best_of: int = 1) -> Change:
    """The paired difference, on the chunks that both have seen: what is hard in a chunk is hard for both, and cancels.

    best_of: `before` was chosen, by these very chunks, as the best of so many, which makes it look better than it is.
    The interval is Student's t, for so many comparisons (Bonferroni). Raises ValueError where the two are not of the
    same lines with the same masks.
    """
    n = min(len(before.losses), len(after.losses))
    before, after = before.first(n), after.first(n)
    if not (np.array_equal(before.masked, after.masked) and np.array_equal(before.lines, after.lines)):
        raise ValueError("these evaluations are not of the same text and tokenizer")
    differences, masked = sum_by_line(before.lines, after.losses - before.losses, before.masked)  # (lines,) each
    loss, se, lines = after.loss - before.loss, standard_error(differences, masked), len(masked)
    margin = float(student_t.ppf(1 - 0.025 / best_of, lines - 1)) * se if lines > 1 else math.inf
    return Change(loss, se, loss - margin, loss + margin)


def save_evaluation(path: Path, evaluation: Evaluation, step: int) -> None:
    """Writes the evaluation after a step as a safetensors file, atomically."""
    with atomic_write(path) as temporary:
        save_file(evaluation._asdict() | {"step": np.array([step])}, temporary)


def load_evaluation(path: Path) -> tuple[Evaluation, int]:
    """What `save_evaluation` wrote, and after which step. Raises OSError or ValueError where it cannot be read."""
    try:
        arrays = load_file(path)
        step = int(arrays.pop("step")[0])
        return Evaluation(**arrays), step
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@heartbeat.at_work()
@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[tuple[np.ndarray, Sequences]],
    lines: np.ndarray,
    micro_batcher: MicroBatcher,
    stop: StopRequest,
) -> Evaluation:
    """Scores the chunks of all ranks, of which `batches` are this rank's, each with the chunks' places among all.

    lines: (n,) uint64, which line each of all ranks' chunks is from. Where a rank runs out of memory it halves its
    micro-batches, and all ranks use the smallest afterwards. Raises UserError where they cannot be halved any more, and
    Stopped, on all ranks, once any of them has received a signal.
    """
    model = accelerator.unwrap_model(model).eval()
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    scores = torch.zeros((3, len(lines)), dtype=exact, device=accelerator.device)
    positions_before = micro_batcher.max_positions
    with progress_bar("evaluating", len(lines), " chunks", shown=accelerator.is_main_process) as bar:
        for places, masked_chunks in batches:
            if stop.received:
                break
            batch_scores = _score(model, masked_chunks, micro_batcher, exact)  # (3, n)
            scores[:, torch.from_numpy(places).to(scores.device)] = batch_scores
            bar.update(len(places) * accelerator.num_processes)

    # The ranks put their scores together, and agree on whether to stop and how large micro-batches are.
    signalled = torch.full_like(scores[0, :1], bool(stop.received))
    reduced = accelerator.reduce(torch.cat([scores.flatten(), signalled])).cpu().double()
    stop.is_agreed = bool(reduced[-1])
    positions = torch.tensor([micro_batcher.max_positions], device=accelerator.device)
    micro_batcher.limit(int(accelerator.gather(positions).min()))
    if micro_batcher.max_positions < positions_before:
        say(f"out of memory in an evaluation: micro-batches were cut to {micro_batcher.max_positions} positions")
    if stop.is_agreed:
        raise Stopped
    losses, correct, masked = reduced[:-1].reshape(scores.shape).numpy()
    return Evaluation(losses, correct, masked, lines)


def _score(model: nn.Module, chunks: Sequences, micro_batcher: MicroBatcher, dtype: torch.dtype) -> Tensor:
    """Returns summed loss, correct guesses and masked tokens of each chunk: (3, n)."""
    while True:
        try:
            with detect_out_of_memory():
                return _score_micro_batches(model, chunks, micro_batcher, dtype)
        except OutOfMemory:
            pass
        micro_batcher.halve()


def _score_micro_batches(
    model: nn.Module, chunks: Sequences, micro_batcher: MicroBatcher, dtype: torch.dtype
) -> Tensor:
    chunk_of_target = np.repeat(np.arange(len(chunks.lengths)), chunks.lengths)[chunks.label_positions]
    chunk, target = (torch.from_numpy(array).to(micro_batcher.device) for array in (chunk_of_target, chunks.targets))
    scores = torch.zeros((3, len(chunks.lengths)), dtype=dtype, device=micro_batcher.device)
    numbered = chunks._replace(targets=np.arange(len(chunks.targets)))  # as packing changes their order
    for inputs, numbers in micro_batcher(numbered):
        heartbeat.advance()
        logits = model(**inputs).float()  # (masked, vocabulary)
        losses = F.cross_entropy(logits, target[numbers], reduction="none")
        correct = logits.argmax(-1) == target[numbers]
        found = torch.stack([losses, correct, torch.ones_like(losses)]).to(dtype)  # (3, masked)
        scores.index_add_(1, chunk[numbers], found)
    return scores
