"""How good a model is: its loss and accuracy on the test text, and its guesses for hidden words."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BertForMaskedLM, PreTrainedTokenizerBase, pipeline

from mlm.batches import MaskedChunks, MicroBatch, StepQueue

SHOWN_WORDS = 5  # hidden words that a model guesses


class Evaluation(NamedTuple):
    """The model on the test text, masked by BERT's rule at 15% with masks that depend on the text alone."""

    loss: float  # nats per masked token
    accuracy: float  # share of masked tokens whose most likely guess is right
    masked_tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def columns(self) -> dict[str, float]:
        """The columns of metrics.csv."""
        return {"eval_loss": self.loss, "perplexity": self.perplexity, "masked_accuracy": self.accuracy}


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats."""
    return math.exp(min(loss, 700.0))  # exp of more overflows a float


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[MaskedChunks],
    queue: StepQueue,
    signals: list[int],
) -> tuple[Evaluation, bool]:
    """Loss and accuracy on this rank's batches and those of all others.

    Where memory runs out the queue's micro-batches are halved, and then those of all ranks. Gives up once `signals` of
    any rank holds one; the second value says so, and the first is then worth nothing.
    """
    model = accelerator.unwrap_model(model).eval()
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    totals = torch.zeros(3, dtype=exact, device=accelerator.device)  # summed loss, right guesses, masked tokens
    for chunks in batches:
        if signals:
            break
        while (scores := _score(model, queue.divide(chunks), torch.zeros_like(totals))) is None:
            queue.halve()
        totals += scores
    signalled = torch.full_like(totals[:1], bool(signals))
    loss_sum, right, masked, told_to_stop = accelerator.reduce(torch.cat([totals, signalled])).tolist()
    positions = torch.tensor([queue.micro_batch_positions], device=accelerator.device)
    queue.limit(int(accelerator.gather(positions).min()))
    masked = max(masked, 1)  # a signal may come before the first
    return Evaluation(loss_sum / masked, right / masked, int(masked)), bool(told_to_stop)


def _score(model: nn.Module, micro_batches: list[MicroBatch], totals: Tensor) -> Tensor | None:
    """`totals` (3,) with summed loss, right guesses and masked tokens added; None where memory runs out."""
    try:
        for inputs, targets in micro_batches:
            logits = model(**inputs).float()  # (masked, vocabulary)
            right = (logits.argmax(-1) == targets).sum()
            masked = torch.full_like(right, len(targets))
            totals += torch.stack([F.cross_entropy(logits, targets, reduction="sum"), right, masked])
    except torch.OutOfMemoryError:
        return None
    return totals


# --------------------------------------------------------------------------------------------- guesses for hidden words


class HiddenWord(NamedTuple):
    """A line with one of its words masked, and that word."""

    line: str
    word: str


def hide_words(lines: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[HiddenWord]:
    """Up to five short lines, spread evenly, each with a one-token word near its middle masked."""
    hidden = []
    for line in lines:
        if not 20 <= len(line) <= 90 or tokenizer.mask_token in line:
            continue
        words = re.finditer(r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]{4,}", line)  # a Chinese character, or four letters
        of_one_token = [word for word in words if len(tokenizer.tokenize(word[0])) == 1]
        if of_one_token and tokenizer.unk_token not in tokenizer.tokenize(line):
            start, end = of_one_token[len(of_one_token) // 2].span()
            hidden.append(HiddenWord(line[:start] + tokenizer.mask_token + line[end:], line[start:end]))
    return hidden[:: max(1, len(hidden) // SHOWN_WORDS)][:SHOWN_WORDS]


def guess(model: BertForMaskedLM, hidden: list[HiddenWord], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The model's three likeliest words for the masked place of each line, with their probabilities."""
    options: dict[str, Any] = {"tokenizer": tokenizer, "device": model.device, "top_k": 3}
    fill_mask = pipeline("fill-mask", model=model.eval(), **options)
    guesses = [fill_mask(each.line) for each in hidden]
    return ["   ".join(f"{each['token_str']} {each['score']:.0%}" for each in three) for three in guesses]
