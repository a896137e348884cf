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
from mlm.machine import ran_out_of_memory

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
    """Loss and accuracy over the batches of all ranks, of which `batches` are this rank's.

    Where a rank runs out of memory it halves its micro-batches, and all ranks use the smallest afterwards; raises
    UserError where they cannot be halved any more. Gives up once any rank has received a signal: returns a worthless
    evaluation, and True.
    """
    model = accelerator.unwrap_model(model).eval()
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    totals = torch.zeros(3, dtype=exact, device=accelerator.device)  # summed loss, correct guesses, masked tokens
    for chunks in batches:
        if signals:
            break
        scores = _score(model, queue.divide(chunks), torch.zeros_like(totals))
        while scores is None:
            queue.halve()
            scores = _score(model, queue.divide(chunks), torch.zeros_like(totals))
        totals += scores
    signalled = torch.full_like(totals[:1], bool(signals))
    loss_sum, correct, masked_tokens, told_to_stop = accelerator.reduce(torch.cat([totals, signalled])).tolist()
    positions = torch.tensor([queue.micro_batch_positions], device=accelerator.device)
    queue.limit(int(accelerator.gather(positions).min()))
    masked_tokens = max(masked_tokens, 1)  # a signal may come before the first batch
    return Evaluation(loss_sum / masked_tokens, correct / masked_tokens, int(masked_tokens)), bool(told_to_stop)


def _score(model: nn.Module, micro_batches: list[MicroBatch], totals: Tensor) -> Tensor | None:
    """`totals` (3,) with summed loss, correct guesses and masked tokens added; None where memory runs out."""
    try:
        for inputs, targets in micro_batches:
            logits = model(**inputs).float()  # (masked, vocabulary)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            correct = (logits.argmax(-1) == targets).sum()
            totals += torch.stack([loss, correct, torch.full_like(correct, len(targets))])
    except RuntimeError as error:
        if ran_out_of_memory(error):
            return None
        raise
    return totals


# --------------------------------------------------------------------------------------------- guesses for hidden words


class HiddenWord(NamedTuple):
    """A line with one of its words masked, and that word."""

    line: str
    word: str


def hide_words(lines: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[HiddenWord]:
    """At most `SHOWN_WORDS` short lines, spread evenly, each with a one-token word near its middle masked."""
    hidden = []
    for line in lines:
        if not 20 <= len(line) <= 90 or tokenizer.mask_token in line:
            continue
        words = re.finditer(r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]{4,}", line)  # a Chinese character, or four letters
        of_one_token = [word for word in words if len(tokenizer.tokenize(word[0])) == 1]
        if of_one_token and tokenizer.unk_token not in tokenizer.tokenize(line):
            start, end = of_one_token[len(of_one_token) // 2].span()
            hidden.append(HiddenWord(line[:start] + tokenizer.mask_token + line[end:], line[start:end]))
    every = max(1, len(hidden) // SHOWN_WORDS)
    return hidden[::every][:SHOWN_WORDS]


def guess(model: BertForMaskedLM, hidden: list[HiddenWord], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The model's three likeliest words for the masked place of each line, with their probabilities."""
    options: dict[str, Any] = {"tokenizer": tokenizer, "device": model.device, "top_k": 3}
    fill_mask = pipeline("fill-mask", model=model.eval(), **options)
    lines = []
    for hidden_word in hidden:
        candidates = fill_mask(hidden_word.line)
        lines.append("   ".join(f"{candidate['token_str']} {candidate['score']:.0%}" for candidate in candidates))
    return lines
