"""An encoder of any family on packed chunks: hidden states, token logits or classes where something is predicted.

The family's own class runs as it is. A hook behind its encoder takes the hidden states of the wanted positions out, so
that its head, whatever that is called, runs there alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlm.encoder.attention import block_diagonal, windows
from mlm.encoder.families import first_position, takes_token_types


class PackedEncoder(nn.Module):
    """An encoder whose forward takes packed chunks and returns hidden states; subclasses have a head. A module, as
    DistributedDataParallel wraps `forward` alone."""

    def __init__(self, model: PreTrainedModel, attention_dropout: float = 0.0, sep_id: int | None = None):
        """model: of one of transformers' classes; attention_dropout: in training, inside attention; sep_id: the id of
        [SEP], where a chunk may hold two texts whose token types differ."""
        super().__init__()
        self.model, self.attention_dropout, self.sep_id = model, attention_dropout, sep_id
        assert model.config._attn_implementation != "packed", "a model is wrapped once"
        model.set_attn_implementation("packed")
        encoder = model.base_model
        self.windows, self.first_position = windows(encoder), first_position(encoder)
        self.takes_token_types = takes_token_types(encoder)
        encoder.register_forward_hook(self._keep_label_positions, with_kwargs=True)
        for module in encoder.modules():
            has_norm = any(isinstance(child, nn.LayerNorm) for child in module.children())  # ALBERT's, of the input too
            if isinstance(getattr(module, "query", None), nn.Linear) and not has_norm:
                module.register_forward_pre_hook(_cast_once)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        label_positions: Tensor,
        segment_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Returns what the head makes of `label_positions`, (targets,) indices into the flattened (rows, width).

        The ids are (rows, width), positions restart at 0 with every chunk. By a block-diagonal mask, (rows, 1, width,
        width), a position attends to its own segment id in its own row, so padding (id 0) to padding and no softmax is
        empty; or, for one row, variable-length attention takes `cu_seqlens` and `max_seqlen` instead (see `attend`).
        """
        assert (segment_ids is None) == (cu_seqlens is not None), "chunks are kept apart in one of two ways"
        token_types = {"token_type_ids": self._token_types(input_ids, position_ids)} if self.takes_token_types else {}
        return self._predict(
            input_ids=input_ids,
            position_ids=position_ids + self.first_position,
            label_positions=label_positions,
            masks=None if segment_ids is None else block_diagonal(segment_ids, self.windows),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            attention_dropout=self.attention_dropout if self.training else 0.0,
            **token_types,
        )

    def _predict(self, **inputs: Any) -> Tensor:
        """Returns the hidden states (targets, hidden) themselves, as features."""
        return self.model(**inputs).last_hidden_state.squeeze(1)

    @staticmethod  # so that no hook holds what holds the encoder, and a model on a GPU is freed when it is let go
    def _keep_label_positions(encoder: nn.Module, _: Any, inputs: dict[str, Any], output: Any) -> Any:
        """Replaces the encoder's output, (rows, width, hidden), by that of the label positions, (targets, 1, hidden).
        Where the model is called without such, as by anyone but `forward`, it stays."""
        if (label_positions := inputs.get("label_positions")) is not None:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[label_positions][:, None]
        return output

    def _token_types(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Returns token type ids (rows, width): 0 up to a chunk's first [SEP], 1 behind it, where a second text may be.

        Where chunks hold one text: (1, 1), broadcast, so that the gradient is one sum and not a row added per token.
        """
        if self.sep_id is None:
            return torch.zeros((1, 1), dtype=torch.long, device=input_ids.device)
        separators = (input_ids == self.sep_id).long()
        before = separators.cumsum(1) - separators  # in the row
        chunk_starts = torch.arange(input_ids.shape[1], device=input_ids.device) - position_ids
        return (before - before.gather(1, chunk_starts)).clamp(max=1)


class PackedMaskedLM(PackedEncoder):
    """A masked language model. The projection to the vocabulary, the largest matrix product of a small BERT, runs only
    where a token is predicted."""

    def _predict(self, **inputs: Any) -> Tensor:
        """Returns logits (targets, vocabulary)."""
        return self.model(**inputs).logits.squeeze(1)


class PackedClassifier(PackedEncoder):
    """A classifier of texts, by each chunk's first position whatever the family's habit, or of tokens.

    The encoder computes as the caller's autocast says, the head in float32: in 16 bits the likeliest classes would
    often tie.
    """

    def __init__(self, model: PreTrainedModel, sep_id: int | None = None):
        """As `PackedEncoder`, without dropout inside attention."""
        super().__init__(model, sep_id=sep_id)
        encoder_forward = model.base_model.forward

        def forward(*inputs: Any, autocast: torch.autocast, **named: Any) -> Any:
            with autocast:
                return encoder_forward(*inputs, **named)

        model.base_model.forward = forward

    def _predict(self, **inputs: Any) -> Tensor:
        """Returns logits (targets, classes) in float32."""
        device = inputs["input_ids"].device.type
        as_called = torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
        with torch.autocast(device, enabled=False):
            return self.model(**inputs, autocast=as_called).logits.flatten(1)

    @staticmethod
    def _keep_label_positions(encoder: nn.Module, _: Any, inputs: dict[str, Any], output: Any) -> Any:
        """As in `PackedEncoder`, in float32, with what the family's pooler makes of them, where it has one."""
        output = PackedEncoder._keep_label_positions(encoder, _, inputs, output)
        output.last_hidden_state = output.last_hidden_state.float()  # (targets, 1, hidden)
        pooler: Any = getattr(encoder, "pooler", None)
        if isinstance(pooler, nn.Linear):  # ALBERT's, whose activation is beside it
            activation: Any = encoder.pooler_activation
            output.pooler_output = activation(pooler(output.last_hidden_state[:, 0]))
        elif pooler is not None:
            output.pooler_output = pooler(output.last_hidden_state)
        return output


def _cast_once(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Casts the input of query, key and value once: under autocast each of them would keep a copy of its own."""
    hidden, *others = inputs  # (rows, width, hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return (hidden, *others)
