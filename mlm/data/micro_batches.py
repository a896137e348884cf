"""Chunks as micro-batches on the device, and the next step's, prefetched.

*n* is a number of chunks. *Tokens* are the text's own; *positions* count [CLS], [SEP] and padding too.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mlm.data.packing import ROW_POSITIONS, Batch, MaskedChunks, chunk_bounds, divide_chunks, divide_rows, pack
from mlm.data.tokenizer import Vocabulary
from mlm.errors import UserError


class MicroBatch(NamedTuple):
    """What goes through the model at once, on the device."""

    inputs: dict[str, Any]  # the model's, by name
    targets: torch.Tensor  # (masked,) the tokens to predict, at inputs["masked"] of the flattened rows


def make_micro_batches(
    chunks: MaskedChunks, positions: int, vocabulary: Vocabulary, device: torch.device, varlen: bool = False
) -> list[MicroBatch]:
    """Lays the chunks out as micro-batches of at most so many positions each, or one row, on the device.

    With `varlen` a micro-batch is one row without padding, for variable-length attention; without, it is packed rows.
    """
    if varlen and len(chunks.lengths):
        return [_one_row(part, device) for part in divide_chunks(chunks, positions)]
    rows = pack(chunks, min(ROW_POSITIONS, positions), vocabulary)
    return [_packed_rows(part, device) for part in divide_rows(rows, positions)]


def _one_row(chunks, device):
    """What variable-length attention needs beside the row: where the chunks start, and how long the longest is."""
    arrays = {"input_ids": chunks.input_ids[None], "position_ids": chunks.position_ids[None], "masked": chunks.masked}
    arrays["starts"] = chunk_bounds(chunks.lengths).astype(np.int32)
    inputs: dict[str, Any] = {name: _to_device(array, device) for name, array in arrays.items()}
    inputs["longest"] = int(chunks.lengths.max())
    return MicroBatch(inputs, _to_device(chunks.targets, device))


def _packed_rows(rows, device):
    inputs = {name: _to_device(array, device) for name, array in rows._asdict().items() if name != "targets"}
    return MicroBatch(inputs, _to_device(rows.targets, device))


def chunks_of_masked(micro_batches: list[MicroBatch]) -> Iterator[torch.Tensor]:
    """For each micro-batch of those that chunks were divided into: which of these chunks each masked token is of.

    (masked,) int64, counted from 0 over all the micro-batches.
    """
    chunks_before = 0
    for inputs, _ in micro_batches:
        if "starts" in inputs:  # a row for variable-length attention
            yield torch.bucketize(inputs["masked"], inputs["starts"], right=True) - 1 + chunks_before
            chunks_before += len(inputs["starts"]) - 1
        else:
            yield inputs["sequence_ids"].flatten()[inputs["masked"]] - 1


def _to_device(array, device):
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Divide(Protocol):
    """Lays chunks out as micro-batches of at most so many positions each: `make_micro_batches`, the rest given."""

    def __call__(self, chunks: MaskedChunks, positions: int) -> list[MicroBatch]: ...


class StepQueue:
    """The batch of the next step, already on the device in micro-batches, and how large these may be."""

    def __init__(self, batches: Iterator[Batch], divide: Divide, micro_batch_positions: int, longest_chunk: int):
        self.micro_batch_positions = micro_batch_positions
        self._batches, self._divide, self._longest_chunk = batches, divide, longest_chunk
        self.advance()

    def advance(self) -> None:
        """Loads the next step's batch; after the last step there is none, and no micro-batch."""
        self._batch = next(self._batches, None)
        self.micro_batches = self.divide(self._batch.chunks) if self._batch else []

    @property
    def batch(self) -> Batch:
        assert self._batch, "there is a batch as long as there is a step to do"
        return self._batch

    def divide(self, chunks: MaskedChunks) -> list[MicroBatch]:
        """Lays other chunks out in micro-batches of the same size."""
        return self._divide(chunks, self.micro_batch_positions)

    def halve(self) -> None:
        """Halves micro-batches, this step's and those to come, after one that ran out of memory.

        Raises UserError where that cannot be, as a micro-batch holds a chunk at least.
        """
        if self.micro_batch_positions <= self._longest_chunk:
            raise UserError(
                "micro_batch_tokens: out of memory, though a micro-batch holds one chunk alone. A lower "
                "sen_max_length or a smaller model needs less"
            )
        self.limit(self.micro_batch_positions // 2)

    def limit(self, positions: int) -> None:
        """Divides this step's batch, and those to come, into micro-batches of at most so many positions."""
        if positions < self.micro_batch_positions:
            self.micro_batch_positions = positions
            self.micro_batches = self.divide(self._batch.chunks) if self._batch else []
            torch.cuda.empty_cache()
