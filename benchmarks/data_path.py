"""Tokens a second of the data path alone: order, masks, packing and tensors on one core, without a model.

python benchmarks/data_path.py --batch-size 32 --length 25
"""

import argparse
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from data_process import training_batches
from mlm.data.chunks import Chunks
from mlm.data.masking import BERT_RULE
from mlm.data.micro_batches import MicroBatcher
from mlm.data.tokenizer import Vocabulary

SIZE, STEPS = 30522, 2000  # of BERT's vocabulary; timed at a stretch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=25, help="mean tokens a line; lines have half to one and a half")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    lengths = draw.integers(given.length // 2, given.length * 3 // 2 + 1, 200_000)
    tokens = draw.integers(1000, SIZE, lengths.sum(), dtype=np.uint16)
    chunks = Chunks(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths), dtype=np.uint64))
    never = np.zeros(SIZE, dtype=bool)
    vocabulary = Vocabulary(
        cls_id=101, sep_id=102, pad_id=0, unk_id=100, mask_id=103, separators=1,
        regular_ids=np.arange(999, SIZE), begins_word=~never, ends_word=never, is_blank=never,
    )  # fmt: skip
    steps = training_batches(chunks, vocabulary, BERT_RULE, 42, given.batch_size)
    print(platform.platform(), *(f"{name} {version(name)}" for name in ("numpy", "torch")), sep=", ")
    for layout, varlen, positions in (("rows with a mask", False, 2048), ("one row for varlen", True, 1 << 16)):
        micro_batcher = MicroBatcher(
            vocabulary, torch.device("cpu"), varlen, longest_chunk=512, max_positions=positions
        )
        speeds = []
        for _ in range(given.repeats):
            began, seen = time.perf_counter(), 0
            for _ in range(STEPS):
                step = next(steps)
                micro_batcher(step)
                seen += step.tokens
            speeds.append(seen / (time.perf_counter() - began) / 1e6)
        print(f"{layout}: {statistics.median(speeds):.1f} million tokens/s, median of {given.repeats}")


if __name__ == "__main__":
    main()
