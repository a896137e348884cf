"""A training step: gradients summed over micro-batches, and what becomes of them."""

import math
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from Config import Config
from mlm.data.micro_batches import Counts, MicroBatch, Prefetcher
from mlm.errors import UserError
from mlm.randomness import dropout_seed
from mlm.runtime import heartbeat
from mlm.runtime.distributed import on_any_rank
from mlm.runtime.hardware import OutOfMemory, detect_out_of_memory
from mlm.runtime.signals import StopRequest
from mlm.terminal import say
from mlm.training.plan import Plan
from mlm.training.progress import Progress
from mlm.training.run import Learner

MAX_CONSECUTIVE_SKIPS = 5  # steps without a finite loss and gradient; as many end a run
FP16_HALVINGS = 16  # so many more in fp16, whose gradient scaler may first have to halve its 65,536 down to 1


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def has_finite_weights(model: nn.Module) -> bool:
    """Whether no weight is infinite or not a number."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())


def max_consecutive_skips(accelerator: Accelerator) -> int:
    """Returns how many steps in a row may be skipped before a run is given up."""
    return MAX_CONSECUTIVE_SKIPS + (FP16_HALVINGS if accelerator.scaler is not None else 0)


@heartbeat.at_work()
def take_step(
    learner: Learner, progress: Progress, batches: Prefetcher, plan: Plan, config: Config, stop: StopRequest
) -> None:
    """Takes one optimizer step on the next batch; all ranks agree in it on whether to stop, and on what the batch after
    it holds.

    A step whose loss or gradient is not finite changes no weight and is counted as skipped. Raises UserError where
    memory does not suffice for the smallest micro-batch.
    """
    began = time.perf_counter()
    accelerator, optimizer, new = learner.accelerator, learner.optimizer, progress.since_last_log
    counts, step = batches.over_ranks, progress.step + 1
    assert counts.masked_tokens, "there is a batch as long as there is a step to do"
    if not learner.bert.training:  # an evaluation left it without dropout
        learner.model.train()
    set_learning_rate(optimizer, plan.learning_rate(progress.step))

    # Gradients of the loss's mean over all ranks' masked tokens; a step that runs out of memory begins again.
    while True:
        try:
            rank_loss = accumulate_gradients(
                accelerator, learner.model, batches.micro_batches, counts.masked_tokens, config.seed, progress.step
            )
            break
        except OutOfMemory:
            optimizer.zero_grad()
        learner.micro_batcher.halve()
        positions = learner.micro_batcher.max_positions
        say(f"step {step}: out of memory; this and all later steps use micro-batches of {positions}")
    rank_norm = accelerator.clip_grad_norm_(learner.model.parameters(), config.max_grad_norm)
    batches.advance()  # while a GPU is still at work

    # The devices' one synchronisation in a step: the loss of all ranks, whether one of them was told to stop, and how
    # much the next step has, as each has masked its own share alone.
    of_rank = torch.tensor([bool(stop.received), *batches.counts], dtype=_exact(accelerator), device=accelerator.device)
    over_ranks = accelerator.reduce(torch.cat([rank_loss[None].to(of_rank), of_rank]))
    loss_sum, stops, masked_tokens, tokens, grad_norm = torch.cat([over_ranks, rank_norm[None].to(of_rank)]).tolist()
    stop.is_agreed = bool(stops)
    batches.over_ranks = Counts(int(masked_tokens), int(tokens))

    if math.isfinite(loss_sum) and math.isfinite(grad_norm):
        optimizer.step()
        progress.skipped_in_a_row = 0
        new.loss += loss_sum
        new.masked_tokens += counts.masked_tokens
        new.tokens += counts.tokens
    else:
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # fp16: halves the scale that made the gradient overflow
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        say(f"step {step}: skipped, as its loss or gradient is not finite")
    optimizer.zero_grad()
    progress.step = step
    new.steps += 1
    new.seconds += time.perf_counter() - began


def sum_counts(accelerator: Accelerator, of_rank: Counts) -> Counts:
    """Returns what a step has over all ranks, by what this rank's share adds to it: of a run's first step, as every
    other one is told the next."""
    counts = torch.tensor(of_rank, dtype=_exact(accelerator), device=accelerator.device)
    return Counts(*map(int, accelerator.reduce(counts).tolist()))


def _exact(accelerator: Accelerator) -> torch.dtype:
    """Returns a kind of number that holds every count; an Apple GPU, which is one rank alone, has a smaller one."""
    return torch.float32 if accelerator.device.type == "mps" else torch.float64


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: list[MicroBatch],
    masked_tokens: int,
    seed: int,
    step: int,
) -> Tensor:
    """Adds the gradient of the step's mean loss, over the `masked_tokens` of all ranks, to the parameters'.

    Returns the loss summed over this rank's masked tokens. Raises OutOfMemory where memory runs out here or, if the
    model is DistributedDataParallel, on another rank; UserError where it does in the backward pass that the ranks
    share, which cannot be repeated.
    """
    is_shared = isinstance(model, DistributedDataParallel)
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, micro_batch in enumerate(micro_batches):
        heartbeat.advance()
        is_last = number == len(micro_batches) - 1
        torch.manual_seed(dropout_seed(seed, step, number, accelerator.process_index))
        has_failed = False
        try:
            with detect_out_of_memory(), accelerator.no_sync(model):
                # Of logits (targets, vocabulary) that have no name: a name would keep them through the backward pass.
                loss = F.cross_entropy(model(**micro_batch.inputs).float(), micro_batch.targets, reduction="sum")
                share = loss * accelerator.num_processes / masked_tokens  # times their number, as ranks are averaged
                if not (is_last and is_shared):
                    accelerator.backward(share)
        except OutOfMemory:
            has_failed = True

        # Before the last backward pass, in which the ranks' gradients are summed, they hear whether all came this far.
        if is_shared and (is_last or has_failed):
            has_failed = on_any_rank(accelerator, has_failed)
        if has_failed:
            raise OutOfMemory
        if is_last and is_shared:
            try:
                with detect_out_of_memory(), accelerator.trigger_sync_in_backward(model):
                    accelerator.backward(share)
            except OutOfMemory as error:
                remedy = "A lower one, or a lower sen_max_length, needs less"
                raise UserError(f"micro_batch_tokens: out of memory. {remedy}") from error
        loss_sum += loss.detach()
    return loss_sum


def warm_up_reducer(learner: Learner) -> None:
    """Warms up DistributedDataParallel's gradient buckets by two passes of zeros, forward and backward.

    It regroups the gradients in the order of its first backward pass when the second forward pass begins, and then sums
    over more than two ranks in another order. Were these passes steps, they would round differently in a resumed run.
    """
    nothing = torch.zeros((1, 1), dtype=torch.long, device=learner.accelerator.device)
    for _ in range(2):
        logits = learner.model(nothing, nothing, label_positions=nothing[0, :0], segment_ids=nothing)
        (0 * logits.sum()).backward()
    learner.optimizer.zero_grad()
