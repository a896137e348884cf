"""Chunks as micro-batches on the device, and the next step's, prefetched.

*Tokens* are the text's own; *positions* count [CLS], [SEP] and padding too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlm.data.chunks import chunk_bounds
from mlm.data.packing import Rows, Sequences, pack, split_chunks, split_rows
from mlm.data.tokenizer import Vocabulary
from mlm.errors import UserError
from mlm.runtime.hardware import release_memory

# About how long a row is in which a block-diagonal mask keeps the chunks apart. Longer rows waste more attention scores
# between chunks, shorter ones more padding.
ROW_POSITIONS = 192


class MicroBatch(NamedTuple):
    """What goes through the model at once, on the device."""

    inputs: dict[str, Any]  # the model's, by name
    targets: Tensor  # (targets,) what is to be predicted at inputs["label_positions"] of the flattened rows


@dataclass
class MicroBatcher:
    """Splits chunks into micro-batches, in their order, and makes these smaller where memory runs out. With `varlen` a
    micro-batch is one row without padding, for variable-length attention; without, it is packed rows."""

    vocabulary: Vocabulary
    device: torch.device
    varlen: bool
    longest_chunk: int  # positions
    max_positions: int  # of a micro-batch, unless one row or chunk has more

    def __call__(self, chunks: Sequences) -> list[MicroBatch]:
        """Returns the chunks as micro-batches on the device; no chunk is one position of padding."""
        if self.varlen and len(chunks.lengths):
            return [self._one_row(part) for part in split_chunks(chunks, self.max_positions)]
        rows = pack(chunks, min(ROW_POSITIONS, self.max_positions), self.vocabulary)
        return [self._packed_rows(part) for part in split_rows(rows, self.max_positions)]

    def halve(self) -> None:
        """Halves micro-batches after one that ran out of memory. Raises UserError where that cannot be, as a
        micro-batch holds a chunk at least."""
        if self.max_positions <= self.longest_chunk:
            raise UserError(
                "micro_batch_tokens: out of memory, though a micro-batch holds one chunk alone. A lower "
                "sen_max_length or a smaller model needs less"
            )
        self.limit(self.max_positions // 2)

    def limit(self, positions: int) -> None:
        """Makes micro-batches no larger than some positions."""
        if positions < self.max_positions:
            self.max_positions = positions
            release_memory()

    def _one_row(self, chunks: Sequences) -> MicroBatch:
        arrays = {
            "input_ids": chunks.input_ids[None],  # (1, positions)
            "position_ids": chunks.position_ids[None],
            "label_positions": chunks.label_positions,
            "cu_seqlens": chunk_bounds(chunks.lengths).astype(np.int32),  # (chunks + 1,)
        }
        inputs = {name: self._to_device(array) for name, array in arrays.items()}
        return MicroBatch(inputs | {"max_seqlen": int(chunks.lengths.max())}, self._to_device(chunks.targets))

    def _packed_rows(self, rows: Rows) -> MicroBatch:
        inputs = {name: self._to_device(array) for name, array in rows._asdict().items() if name != "targets"}
        return MicroBatch(inputs, self._to_device(rows.targets))

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        is_cuda = self.device.type == "cuda"
        return tensor.pin_memory().to(self.device, non_blocking=True) if is_cuda else tensor.to(self.device)


class Counts(NamedTuple):
    """What a step has, over all ranks."""

    masked_tokens: int
    tokens: int


class Prefetcher:
    """This rank's share of the next step's batch, already on the device in micro-batches."""

    def __init__(self, batches: Iterator[Sequences], micro_batcher: MicroBatcher):
        self._batches, self._micro_batcher = batches, micro_batcher
        self.over_ranks = Counts(0, 0)  # of the next step; whoever talks to the other ranks sets it
        self.advance()

    def advance(self) -> None:
        """Loads the share of the next step; after the last one there is none."""
        self.chunks = next(self._batches, None)
        self._split()

    @property
    def counts(self) -> Counts:
        """What this rank's share adds to the next step's; after the last one nothing."""
        return Counts(len(self.chunks.targets), self.chunks.tokens) if self.chunks else Counts(0, 0)

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The batch's micro-batches, split anew where they have been made smaller since they were loaded."""
        if self._positions != self._micro_batcher.max_positions:
            self._split()
        return self._micro_batches

    def _split(self) -> None:
        self._positions = self._micro_batcher.max_positions
        self._micro_batches: list[MicroBatch] = []  # frees those of before
        if self.chunks:
            self._micro_batches = self._micro_batcher(self.chunks)
