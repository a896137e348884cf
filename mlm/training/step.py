"""A training step and what it needs: the optimizer, and gradients summed over micro-batches."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mlm.data.micro_batches import MicroBatch, StepQueue
from mlm.data.randomness import dropout_seed
from mlm.errors import UserError
from mlm.runtime.distributed import on_any_rank
from mlm.runtime.hardware import ran_out_of_memory
from mlm.terminal import say
from mlm.training.plan import learning_rate_at
from mlm.training.run import Progress, Run

MOST_SKIPPED_STEPS = 5  # in a row; so many without a finite loss and gradient end a run
FP16_HALVINGS = 16  # so many more in fp16, whose gradient scaler may first have to halve its 65,536 down to 1


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices and embeddings alone: not on biases and LayerNorm."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    # BERT's own epsilon: with 1e-8 Adam would blow the rounding noise of the smallest gradients up into steps.
    return torch.optim.AdamW(groups, lr=learning_rate, eps=1e-6, fused=True)


def has_finite_weights(model: nn.Module) -> bool:
    """Whether no weight is infinite or not a number."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())


def patience(accelerator: Accelerator) -> int:
    """How many steps in a row may be skipped before a run is given up."""
    return MOST_SKIPPED_STEPS + (FP16_HALVINGS if accelerator.scaler is not None else 0)


# -------------------------------------------------------------------------------------------------------------- a step


def train_step(run: Run, progress: Progress, queue: StepQueue) -> bool:
    """One optimizer step on the queue's batch. Returns whether any rank was told to stop.

    A step whose loss or gradient is not finite changes no weight and is counted as skipped. Raises UserError where
    memory does not suffice for the smallest micro-batch.
    """
    began = time.perf_counter()
    config, accelerator, optimizer = run.config, run.accelerator, run.optimizer
    batch, step, new = queue.batch, progress.step + 1, progress.unreported
    if not run.bert.training:  # an evaluation left it without dropout
        run.model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(progress.step, config)

    # Gradients of the loss's mean over all ranks' masked tokens, in finer micro-batches where memory runs out.
    def seed_of(micro_batch: int) -> int:
        return dropout_seed(config.seed, step - 1, micro_batch, accelerator.process_index)

    agree = partial(on_any_rank, accelerator)
    while True:
        micro_batches = queue.micro_batches
        rank_loss = accumulate_gradients(accelerator, run.model, micro_batches, batch.masked_tokens, seed_of, agree)
        if rank_loss is not None:
            break
        optimizer.zero_grad()
        queue.halve()
        say(f"step {step}: out of memory; this and all later steps use micro-batches of {queue.micro_batch_positions}")
    rank_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    queue.advance()  # while a GPU is still at work

    # The devices' one synchronisation in a step: the loss of all ranks, and whether one of them was told to stop.
    signalled = torch.full((), float(bool(run.signals)), device=accelerator.device)
    over_ranks = accelerator.reduce(torch.stack([rank_loss, signalled]))
    loss_sum, stops, grad_norm = torch.stack([*over_ranks, rank_norm]).tolist()

    is_finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
    if is_finite:
        optimizer.step()
        progress.skipped_in_a_row = 0
        new.loss += loss_sum
        new.masked_tokens += batch.masked_tokens
        new.tokens += batch.tokens
    else:
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # fp16: halves the scale that made the gradient overflow
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        say(f"step {step}: skipped, as its loss or gradient is not finite")
    optimizer.zero_grad()
    progress.step = step
    new.steps += 1
    new.seconds += time.perf_counter() - began
    return bool(stops)


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: list[MicroBatch],
    masked_tokens: int,
    seed_of: Callable[[int], int],
    agree: Callable[[bool], bool] = bool,
) -> Tensor | None:
    """Adds the gradient of the step's mean loss, over the `masked_tokens` of all ranks, to the parameters'.

    Dropout is seeded by `seed_of` the micro-batch's number. Returns the loss summed over this rank's masked tokens, or
    None where memory runs out here or, by `agree`, on another rank. Raises UserError where it runs out in the backward
    pass that several ranks share, and so cannot be repeated.
    """
    *earlier, last = micro_batches
    loss_sum = torch.zeros((), device=accelerator.device)

    def loss_of(number: int, micro_batch: MicroBatch) -> Tensor:
        torch.manual_seed(seed_of(number))
        return F.cross_entropy(model(**micro_batch.inputs).float(), micro_batch.targets, reduction="sum")

    def add_gradient(loss: Tensor) -> None:
        # DistributedDataParallel averages over the ranks; times their number that is the sum.
        accelerator.backward(loss * accelerator.num_processes / masked_tokens)

    # Everything but the last backward pass, in which the ranks' gradients are summed, each rank does for itself.
    failed = False
    try:
        with accelerator.no_sync(model):
            for number, micro_batch in enumerate(earlier):
                loss = loss_of(number, micro_batch)
                add_gradient(loss)
                loss_sum += loss.detach()
            loss = loss_of(len(earlier), last)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        failed = True
    if agree(failed):
        return None

    several = accelerator.num_processes > 1
    try:
        with accelerator.trigger_sync_in_backward(model) if several else accelerator.no_sync(model):
            add_gradient(loss)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        if several:
            raise UserError(
                "micro_batch_tokens: out of memory. A lower one, or a lower sen_max_length, needs less"
            ) from error
        return None
    return loss_sum + loss.detach()


def warm_up_reducer(run: Run) -> None:
    """Makes two passes of zeros, forward and backward.

    DistributedDataParallel regroups the gradients in the order of its first backward pass when the second forward pass
    begins, and then sums over more than two ranks in another order. Were these passes steps, they would round
    differently in a resumed run.
    """
    nothing = torch.zeros((1, 1), dtype=torch.long, device=run.accelerator.device)
    for _ in range(2):
        logits = run.model(nothing, nothing, masked=nothing[0, :0], sequence_ids=nothing)
        (0 * logits.sum()).backward()
    run.optimizer.zero_grad()
