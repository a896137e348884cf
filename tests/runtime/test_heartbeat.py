"""Whom the heartbeat ends: ranks that hang, and those that wait for them. Whom it does not: those that are slow."""

import time

import pytest
from accelerate import Accelerator
from runs import checkpoints, finish, folder_of, fork_ranks

from mlm.encoder.packed import PackedMaskedLM
from mlm.evaluation import loss
from mlm.runtime import heartbeat
from mlm.training import checkpoint

pytestmark = pytest.mark.slow


def lose_patience_soon():
    heartbeat.BEAT_S, heartbeat.HUNG_AFTER_S = 0.1, 2.0


def hang(*arguments):
    time.sleep(10**6)


def hang_in_a_step():
    lose_patience_soon()
    Accelerator.clip_grad_norm_ = hang


def hang_in_an_evaluation():
    lose_patience_soon()
    loss._score = hang


@pytest.mark.parametrize("hanging", [hang_in_a_step, hang_in_an_evaluation])
def test_a_rank_that_hangs_ends_itself_and_the_other(settings, hanging):
    for rank, process in enumerate(fork_ranks(settings(), 2, {0: lose_patience_soon, 1: hanging})):
        out, _ = finish(process, 1)
        assert f"error: rank {rank} lost touch with another rank" in out and "Traceback" not in out


def be_slow():
    """Micro-batches take 1.2 seconds, of which a step has several, and a checkpoint takes 12; 2 without a sign of life
    are too many."""
    lose_patience_soon()
    forward, save = PackedMaskedLM.forward, checkpoint.save_checkpoint

    def slow_forward(self, *arguments, **inputs):
        time.sleep(1.2 if heartbeat._heart.is_at_work and self.training else 0)
        return forward(self, *arguments, **inputs)

    def slow_save(*arguments):
        time.sleep(12)
        save(*arguments)

    PackedMaskedLM.forward, checkpoint.save_checkpoint = slow_forward, slow_save


def test_ranks_that_are_slow_but_work_are_left_alone(settings):
    config = settings(max_steps=2, save_every=1, keep_checkpoints=2, batch_size=16, micro_batch_tokens=64)
    for rank in fork_ranks(config, 2, {0: be_slow, 1: be_slow}):
        finish(rank)
    assert checkpoints(folder_of(config)) == [1]


def be_slower_and_slower():
    """Each micro-batch takes three times as long as the one before, up to 8 seconds."""
    lose_patience_soon()
    forward, seconds = PackedMaskedLM.forward, [0.1]

    def slow_forward(self, *arguments, **inputs):
        if heartbeat._heart.is_at_work and self.training:
            seconds[0] = min(8.0, 3 * seconds[0])
            time.sleep(seconds[0])
        return forward(self, *arguments, **inputs)

    PackedMaskedLM.forward = slow_forward


def test_ranks_whose_micro_batches_take_long_are_left_alone(settings):
    config = settings(max_steps=2, batch_size=16, micro_batch_tokens=128)
    for rank in fork_ranks(config, 2, {0: be_slower_and_slower, 1: be_slower_and_slower}):
        finish(rank)
