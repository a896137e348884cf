"""How large a micro-batch may be, for the memory of the device."""

import math
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from Config import Config
from mlm.data.packing import Sequences, frame
from mlm.data.tokenizer import Vocabulary
from mlm.runtime.hardware import OutOfMemory, release_memory
from mlm.terminal import say
from mlm.training.run import Learner
from mlm.training.step import accumulate_gradients

# On a CPU: larger micro-batches slow a large model down, as what it keeps for the backward pass leaves the caches;
# smaller ones slow a small model down, as each call costs more than its work.
CPU_MICRO_BATCH_POSITIONS = 3072
LARGEST_MICRO_BATCH_POSITIONS = 1 << 16  # on a GPU, which more would not fill better
SPARE_SHARE = 0.07  # of a GPU's memory


def choose(learner: Learner, config: Config, found: int | None) -> int:
    """Returns the positions of micro-batches: the user's, else the usual ones, but on a GPU what a trial finds to fit.

    found: by an earlier trial. A resumed run must use the same micro-batches, as each draws dropout of its own.
    """
    if not is_found_by_trial(learner.accelerator, config):
        return config.micro_batch_tokens or CPU_MICRO_BATCH_POSITIONS
    if found is None:
        found = fit_memory(learner, config)
        say(f"micro_batch_tokens: {found:,} fit the memory")
    return found


def is_found_by_trial(accelerator: Accelerator, config: Config) -> bool:
    """Whether nobody but the GPU's memory decides how large a micro-batch may be."""
    return not config.micro_batch_tokens and accelerator.device.type == "cuda"


def fit_memory(learner: Learner, config: Config) -> int:
    """Returns the positions of the largest micro-batch, at most a step's, that every rank has the memory to train on.

    Found by trial, beside what training will hold as well: full gradients, AdamW's moments and some spare memory. The
    model is unwrapped for it, as a rank that runs out of memory must not leave others waiting.
    """
    accelerator = learner.accelerator
    model = accelerator.unwrap_model(learner.model).train()
    undivided = replace(learner.micro_batcher, max_positions=1 << 30)  # which no batch has

    def fits(chunks: int) -> bool:
        micro_batches = undivided(_trial_chunks(chunks, undivided.vocabulary, config))
        try:
            accumulate_gradients(accelerator, model, micro_batches, masked_tokens=1, seed=0, step=0)
            return True
        except OutOfMemory:
            return False
        finally:
            release_memory()

    fits(1)  # loads kernels and handles, and leaves gradients as a second micro-batch finds them
    moments = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
    spare = torch.empty(_spare_bytes(accelerator.device), dtype=torch.uint8, device=accelerator.device)
    chunks_on_a_rank = math.ceil(config.batch_size / accelerator.num_processes)
    chunks = max(1, min(chunks_on_a_rank, LARGEST_MICRO_BATCH_POSITIONS // config.sen_max_length))
    while chunks > 1 and not fits(chunks):
        chunks //= 2
    del moments, spare
    model.zero_grad()
    torch.cuda.empty_cache()
    if config.compile and accelerator.num_processes > 1:
        torch.compiler.reset()  # what was compiled for the model by itself would hide its ranks' gradients from overlap
    positions = torch.tensor([chunks * config.sen_max_length], device=accelerator.device)
    return int(accelerator.gather(positions).min())


def _trial_chunks(number: int, vocabulary: Vocabulary, config: Config) -> Sequences:
    """Returns chunks of the greatest length, with more masked tokens than chance brings in lines of three tokens or
    more; of one token by itself all are masked."""
    lengths = np.full(number, config.sen_max_length - 2)  # without [CLS] and [SEP]
    ids = np.full(lengths.sum(), vocabulary.mask_id)
    assert config.mlm_probability, "`resolve` has set it"
    highest = max(config.mlm_probability, config.mlm_probability_end or 0.0)
    share = min(1.0, max(0.25, 1.5 * highest))
    masked = np.arange(0, len(ids), 1 / share).astype(np.int64)
    return frame(ids, masked, ids[masked], lengths, vocabulary)


def _spare_bytes(device: torch.device) -> int:
    """Returns what is left free for fragmentation and whatever else comes to use the GPU."""
    return int(SPARE_SHARE * torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0
