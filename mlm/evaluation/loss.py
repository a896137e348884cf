"""How good a model is: its loss on chunks of the test text, one by one, so that every figure has its error."""

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

from mlm.data.micro_batches import MicroBatch, StepQueue, chunks_of_masked
from mlm.data.packing import MaskedChunks
from mlm.runtime.hardware import ran_out_of_memory
from mlm.terminal import progress_bar

# Evaluations between the first and the last score a sample of the test chunks.
SAMPLE_ERROR = 0.01  # the standard error wanted of a loss, in nats: one per cent of the perplexity
USUAL_SPREAD = 4.0  # nats, of a masked token's loss once a model has learned something: 1.8 to 3.8 in four runs
LARGEST_EVALUATION_SHARE = 0.05  # of training's work, for all of them together
SMALLEST_SAMPLE = 256  # chunks, whatever share they are
STEP_IN_FORWARD_PASSES = 3  # a training step is a forward pass, and a backward pass of about twice its work


class Evaluation(NamedTuple):
    """A model on n chunks of text, masked by BERT's rule at 15% with masks that depend on the text alone."""

    losses: np.ndarray  # (n,) float64: nats, summed over a chunk's masked tokens
    correct: np.ndarray  # (n,) float64: masked tokens whose most likely guess is right
    masked: np.ndarray  # (n,) float64: masked tokens, at least one

    @property
    def loss(self) -> float:
        """Nats per masked token."""
        return float(self.losses.sum() / self.masked.sum())

    @property
    def loss_se(self) -> float:
        """The standard error of `loss`, for more text of this kind."""
        return standard_error(self.losses, self.masked)

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
        return Evaluation(self.losses[:chunks], self.correct[:chunks], self.masked[:chunks])


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats."""
    return math.exp(min(loss, 700.0))  # exp of more overflows a float


def standard_error(sums: np.ndarray, counts: np.ndarray) -> float:
    """The standard error of sums.sum() / counts.sum(), where each chunk (n,) was drawn by itself; infinite for one.

    The ratio estimator's, with chunks as clusters of tokens (Cochran, Sampling Techniques, 3rd edition, 6.3 and 9A.1).
    """
    n = len(sums)
    if n < 2:
        return math.inf
    rest = sums - sums.sum() / counts.sum() * counts  # (n,) what the mean does not explain of each chunk
    return float(math.sqrt(n / (n - 1) * (rest @ rest)) / counts.sum())


class Change(NamedTuple):
    """How a model's loss differs from another's on the same chunks, with the same masks."""

    loss: float  # nats per masked token; below 0 it fell
    se: float  # its standard error, over the chunks
    low: float  # of the 95% interval
    high: float


def compare(before: Evaluation, after: Evaluation) -> Change:
    """The paired difference, on the chunks that both have seen: what is hard in a chunk is hard for both, and cancels.

    The interval is Student's t. Raises ValueError where the two do not have the same masks.
    """
    n = min(len(before.losses), len(after.losses))
    before, after = before.first(n), after.first(n)
    if not np.array_equal(before.masked, after.masked):
        raise ValueError("these evaluations are not of the same text and tokenizer")
    loss, se = after.loss - before.loss, standard_error(after.losses - before.losses, before.masked)
    reach = float(student_t.ppf(0.975, n - 1)) * se if n > 1 else math.inf
    return Change(loss, se, loss - reach, loss + reach)


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Writes it as a safetensors file."""
    save_file(evaluation._asdict(), path)


def load_evaluation(path: Path) -> Evaluation:
    """What `save_evaluation` wrote. Raises OSError or ValueError where it cannot be read."""
    try:
        return Evaluation(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def sample_size(
    start: Evaluation, chunks: int, training_positions: int, positions_per_chunk: float, evaluations: int
) -> int:
    """How many of the `chunks` of the test text each of so many evaluations in the middle of a run scores.

    start: the evaluation before training; training_positions: what the whole run trains on. By these counts alone, and
    by no clock, so that a run that is resumed takes the same chunks.
    """
    for_the_error = (USUAL_SPREAD / SAMPLE_ERROR) ** 2 / start.masked.mean()
    if math.isfinite(start.loss_se):
        for_the_error = max(for_the_error, len(start.losses) * (start.loss_se / SAMPLE_ERROR) ** 2)
    most_positions = LARGEST_EVALUATION_SHARE * STEP_IN_FORWARD_PASSES * training_positions / max(1, evaluations)
    wanted = min(for_the_error, most_positions / positions_per_chunk)
    return round(min(chunks, max(SMALLEST_SAMPLE, wanted)))


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[tuple[np.ndarray, MaskedChunks]],
    chunks: int,
    queue: StepQueue,
    signals: list[int],
) -> Evaluation | None:
    """Scores the chunks of all ranks, of which `batches` are this rank's, each with the chunks' places among all.

    chunks: how many all ranks have. Where a rank runs out of memory it halves its micro-batches, and all ranks use the
    smallest afterwards; raises UserError where they cannot be halved any more. Gives up, and returns None, once any
    rank has received a signal.
    """
    model = accelerator.unwrap_model(model).eval()
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    scores = torch.zeros((3, chunks), dtype=exact, device=accelerator.device)
    with progress_bar("evaluating", chunks, " chunks", shown=accelerator.is_main_process) as bar:
        for places, masked_chunks in batches:
            if signals:
                break
            of_batch = _score(model, queue.divide(masked_chunks), scores.new_zeros(3, len(places)))
            while of_batch is None:
                queue.halve()
                of_batch = _score(model, queue.divide(masked_chunks), scores.new_zeros(3, len(places)))
            scores[:, torch.from_numpy(places).to(scores.device)] = of_batch
            bar.update(len(places) * accelerator.num_processes)
    signalled = torch.full_like(scores[0, :1], bool(signals))
    *flat, told_to_stop = accelerator.reduce(torch.cat([scores.flatten(), signalled])).cpu().split([scores.numel(), 1])
    positions = torch.tensor([queue.micro_batch_positions], device=accelerator.device)
    queue.limit(int(accelerator.gather(positions).min()))
    if told_to_stop.item():
        return None
    return Evaluation(*flat[0].reshape(scores.shape).double().numpy())


def _score(model: nn.Module, micro_batches: list[MicroBatch], scores: Tensor) -> Tensor | None:
    """Adds summed loss, correct guesses and masked tokens of each chunk to `scores` (3, n); None where memory runs
    out."""
    try:
        for (inputs, targets), chunk_of in zip(micro_batches, chunks_of_masked(micro_batches), strict=True):
            logits = model(**inputs).float()  # (masked, vocabulary)
            losses = F.cross_entropy(logits, targets, reduction="none")
            correct = logits.argmax(-1) == targets
            found = torch.stack([losses, correct, torch.ones_like(losses)]).to(scores.dtype)  # (3, masked)
            scores.index_add_(1, chunk_of, found)
    except RuntimeError as error:
        if ran_out_of_memory(error):
            return None
        raise
    return scores
