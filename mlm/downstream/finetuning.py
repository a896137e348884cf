"""Fine-tuning: a classifier trained on a task, kept as it was when it was best on dev; and its predictions.

After Zhang et al., Revisiting Few-sample BERT Fine-tuning (arXiv 2006.05987): AdamW with bias correction, and hundreds
of updates even where data are few.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from Config import DownstreamConfig
from mlm.data.chunks import chunk_bounds, steps_per_epoch
from mlm.data.micro_batches import MicroBatch, MicroBatcher
from mlm.data.packing import Sequences, slice_chunks
from mlm.downstream.encoding import Encoded, training_order
from mlm.randomness import dropout_seed
from mlm.terminal import progress_bar
from mlm.training.optimizer import make_optimizer
from mlm.training.plan import learning_rate_at
from mlm.training.step import has_finite_weights, set_learning_rate

WARMUP_SHARE, WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 0.01, 1.0
MAX_EVALUATIONS = 10  # on dev, in one fine-tuning
CHUNKS_AT_ONCE = 256  # packed together where nothing is trained


class Budget(NamedTuple):
    """The training that every model is given."""

    steps: int  # optimizer steps
    evaluate_every: int  # steps
    batch_size: int  # examples
    learning_rate: float  # peak

    @classmethod
    def for_examples(cls, train: int, dev: int, config: DownstreamConfig, learning_rate: float) -> "Budget":
        """Returns a budget for a number of examples, with an evaluation per epoch, or fewer where epochs are many, or
        dev is long."""
        epoch_steps = steps_per_epoch(train, config.batch_size)
        steps = max(config.num_epochs * epoch_steps, config.min_steps)
        evaluate_every = max(epoch_steps, math.ceil(steps / MAX_EVALUATIONS), dev // config.batch_size)
        return cls(steps, min(evaluate_every, steps), config.batch_size, learning_rate)


def fine_tune(
    classifier: nn.Module,
    train: Encoded,
    dev: Encoded,
    score_on_dev: Callable[[list[int]], float],
    budget: Budget,
    seed: int,
    accelerator: Accelerator,
    micro_batcher: MicroBatcher,
) -> tuple[int, float]:
    """Trains the classifier, and leaves it with the weights that scored best on dev, the earliest of equals.

    Returns the step after which it was best, and its score. The seed decides order and dropout. Weights that are not
    finite are never the best; where all are, it is left as it was, and the step is 0.
    """
    if accelerator.scaler is not None:  # which remembers the scale that the last classifier needed
        accelerator.scaler.load_state_dict(torch.amp.GradScaler().state_dict())
    optimizer = accelerator.prepare(make_optimizer(classifier, "adamw", budget.learning_rate, WEIGHT_DECAY))
    warmup_steps = round(WARMUP_SHARE * budget.steps)
    best_step, best_score, best_weights = 0, 0.0, deepcopy(classifier.state_dict())
    batches = islice(training_order(train, budget.batch_size, seed), budget.steps)
    with progress_bar(f"seed {seed}", budget.steps, " steps") as bar:
        for step, batch in enumerate(batches, start=1):
            classifier.train()
            rate = learning_rate_at(step - 1, budget.learning_rate, warmup_steps, warmup_steps, budget.steps)
            set_learning_rate(optimizer, rate)
            for number, (inputs, targets) in enumerate(micro_batcher(batch)):
                torch.manual_seed(dropout_seed(seed, step, number, 0))
                with accelerator.autocast():
                    logits = classifier(**inputs).float()  # (targets, classes)
                accelerator.backward(F.cross_entropy(logits, targets, reduction="sum") / len(batch.targets))
            accelerator.clip_grad_norm_(classifier.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if step % budget.evaluate_every == 0 or step == budget.steps:
                score = score_on_dev(predict(classifier, dev, accelerator, micro_batcher))
                if (score > best_score or best_step == 0) and has_finite_weights(classifier):
                    best_step, best_score, best_weights = step, score, deepcopy(classifier.state_dict())
    classifier.load_state_dict(best_weights)
    return best_step, best_score


@torch.no_grad()
def predict(
    classifier: nn.Module, encoded: Encoded, accelerator: Accelerator, micro_batcher: MicroBatcher
) -> list[int]:
    """Returns the likeliest class id of each text, or word, in their order."""
    predictions = np.empty(len(encoded.chunks.targets), dtype=np.int64)
    classifier.eval()
    numbered = encoded.chunks._replace(targets=np.arange(len(predictions)))  # as packing changes their order
    for inputs, numbers in split_chunks(numbered, micro_batcher):
        with accelerator.autocast():
            logits = classifier(**inputs)  # (targets, classes)
        predictions[numbers.cpu().numpy()] = logits.argmax(-1).cpu().numpy()
    return predictions.tolist()


def split_chunks(chunks: Sequences, micro_batcher: MicroBatcher) -> Iterator[MicroBatch]:
    """Yields all chunks in micro-batches."""
    bounds = chunk_bounds(chunks.lengths)
    for start in range(0, len(chunks.lengths), CHUNKS_AT_ONCE):
        yield from micro_batcher(slice_chunks(chunks, bounds, start, min(start + CHUNKS_AT_ONCE, len(chunks.lengths))))
