"""Whom the heartbeat leaves alone: ranks that are slow but work, and those that wait for the main one to write."""

import time

import pytest
from runs import checkpoints, finish, folder_of, fork_ranks

from mlm.encoder.packed import PackedMaskedLM
from mlm.runtime import heartbeat
from mlm.training import checkpoint

pytestmark = pytest.mark.slow


def be_slow():
    """Micro-batches take 1.2 seconds, of which a step has several, and a checkpoint takes 5; 2 without a sign of life
    are too many."""
    heartbeat.BEAT_S, heartbeat.HUNG_AFTER_S = 0.1, 2.0
    forward, save = PackedMaskedLM.forward, checkpoint.save_checkpoint

    def slow_forward(self, *arguments, **inputs):
        time.sleep(1.2 if heartbeat._heart.is_at_work and self.training else 0)
        return forward(self, *arguments, **inputs)

    def slow_save(*arguments):
        time.sleep(5)
        save(*arguments)

    PackedMaskedLM.forward, checkpoint.save_checkpoint = slow_forward, slow_save


def test_ranks_that_are_slow_but_work_are_left_alone(settings):
    config = settings(max_steps=2, save_every=1, keep_checkpoints=2, batch_size=16, micro_batch_tokens=64)
    for rank in fork_ranks(config, 2, {0: be_slow, 1: be_slow}):
        finish(rank)
    assert checkpoints(folder_of(config)) == [1]


def be_slower_and_slower():
    """Each micro-batch takes three times as long as the one before, up to 8 seconds."""
    heartbeat.BEAT_S, heartbeat.HUNG_AFTER_S = 0.1, 2.0
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
