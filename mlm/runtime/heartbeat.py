"""The heartbeat of several ranks: a thread of each ends its process where another is gone, cut off or hung.

The timeouts of collectives cannot do this: they say how much later than the others a rank may come, and the main rank
comes late wherever it writes to a slow disk. Nor could they end the one that hangs.
"""

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event, Thread

import torch

BEAT_S = 5.0
CUT_OFF_AFTER = timedelta(seconds=60)  # without a beat
HUNG_AFTER_S = 90.0  # without a micro-batch on any rank, all of which are at work on one
TIMES_THE_LONGEST = 4  # micro-batch so far, where that is longer: a backward pass takes twice a forward pass
SECONDS_TO_SPEAK = 5.0  # for a main thread that knows better why another rank is gone


@dataclass
class _Heart:
    """What this rank adds to a beat, and the thread."""

    micro_batches: int = 0
    is_at_work: bool = False  # in a step or an evaluation, which all ranks do together
    is_done: Event = field(default_factory=Event)
    thread: Thread | None = None


_heart = _Heart()


def start(output: str, is_compiled: bool) -> None:
    """Lets the hearts of all ranks beat from now on; all call it.

    output: the folder to be named where a rank is lost; is_compiled: micro-batches may take any time.
    """
    group = torch.distributed.new_group(backend="gloo", timeout=CUT_OFF_AFTER)
    _heart.thread = Thread(target=_beat, args=(group, output, is_compiled), daemon=True)
    _heart.thread.start()


def advance() -> None:
    """Notes that this rank gets on: it begins a micro-batch."""
    _heart.micro_batches += 1


@contextmanager
def at_work():
    """Has the ranks expect micro-batches of each other, once all of them are in such a block. A decorator, too."""
    _heart.is_at_work = True
    advance()
    try:
        yield
    finally:
        _heart.is_at_work = False


def stop() -> None:
    """Lets the hearts rest once all ranks have called this, so that none takes the others' end for a loss."""
    if _heart.thread:
        _heart.is_done.set()
        _heart.thread.join()


def lost_touch(output: str) -> str:
    """Returns what is said where another rank is lost."""
    return (
        f"error: rank {os.environ.get('RANK', 0)} lost touch with another rank, which may have said why above. The "
        f"same command with --resume continues from the newest checkpoint in {output}"
    )


def _beat(group, output, is_compiled):
    seen, changed_at, longest = 0, time.monotonic(), 0.0
    try:
        while True:
            _heart.is_done.wait(BEAT_S)
            ranks = torch.tensor([_heart.micro_batches, _heart.is_at_work, _heart.is_done.is_set()])
            torch.distributed.all_reduce(ranks, group=group)
            micro_batches, at_work, done = ranks.tolist()
            if done == group.size():
                return
            now = time.monotonic()
            if is_compiled or at_work < group.size():
                seen, changed_at = micro_batches, now
            elif micro_batches != seen:
                seen, changed_at, longest = micro_batches, now, max(longest, now - changed_at)
            elif now - changed_at > max(HUNG_AFTER_S, TIMES_THE_LONGEST * longest):
                break
    except RuntimeError:
        time.sleep(SECONDS_TO_SPEAK)
    os.write(2, f"{lost_touch(output)}\n".encode())  # by os.write, as the main thread may hang within a print
    os._exit(1)
