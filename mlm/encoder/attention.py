"""Attention that keeps packed chunks apart, for any encoder that takes its attention from transformers' interface.

The function is registered by a name for which transformers knows no mask. So no family makes one of its own, and what
a caller gives the model as keyword arguments reaches the function in every layer.
"""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from mlm.encoder.families import head_size
from mlm.runtime.hardware import has_variable_length_kernels

# Up to this width of rows, forward and backward in bfloat16 on a CPU are faster by plain operations than by torch's
# fused attention (benchmarks/RESULTS.md, "Attention on a CPU").
WIDEST_PLAIN_ATTENTION = 256

Windows = set[int | None]
Masks = dict[int | None, Tensor]


def windows(encoder: nn.Module) -> Windows:
    """Returns the windows of an encoder's layers, as they hand them to `attend`: a position sees those less than so
    many positions away; None: all."""
    return {getattr(module, "sliding_window", None) for module in encoder.modules()}


def has_variable_lengths(model: PreTrainedModel, attention_dropout: float, precision: str) -> bool:
    """Whether a model's attention can go by variable-length kernels on this machine. A window is an argument that those
    of early releases did not take."""
    takes_windows = "window_size" in inspect.signature(varlen_attn).parameters
    fits = windows(model.base_model) == {None} or takes_windows
    return fits and has_variable_length_kernels(attention_dropout, precision, head_size(model.config))


def block_diagonal(segment_ids: Tensor, of_windows: Windows) -> Masks:
    """Returns for each window which positions see which, (rows, 1, width, width), for segment ids (rows, width): those
    of one id, and within the window. As 0 and minus infinity, to be added to the scores, where plain attention is the
    faster; else as booleans."""
    same_chunk = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    is_bfloat16_on_cpu = (
        segment_ids.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    width = segment_ids.shape[-1]
    is_plain = is_bfloat16_on_cpu and torch.is_grad_enabled() and width <= WIDEST_PLAIN_ATTENTION
    masks = {}
    for window in of_windows:
        mask = same_chunk if window is None else same_chunk & _is_within(window, width, segment_ids.device)
        if is_plain:
            mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, float("-inf"))
        masks[window] = mask
    return masks


def _is_within(window: int, width: int, device: torch.device) -> Tensor:
    """Returns which positions of a row are less than `window` apart: (width, width) bool."""
    place = torch.arange(width, device=device)
    return (place[:, None] - place[None, :]).abs() < window


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    masks: Masks | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: Any = None,
    attention_dropout: float = 0.0,
    **of_the_family: object,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function: (rows, heads, width, head size) to (rows, width, heads, ...).

    With `cu_seqlens`, (chunks + 1,) int32, where each chunk of the one row begins and the last ends, and `max_seqlen`,
    the positions in the longest chunk: by variable-length kernels. With `masks` of `block_diagonal`: by plain
    operations where they are to be added, else by torch's fused attention. With neither a row is one chunk without
    padding. Queries may be more heads than keys and values, which then serve several each. Dropout is what the caller
    of the model says, whatever the family's layers say. Returns the output, and None for the attention weights.
    """
    if query.shape[1] != key.shape[1]:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    usual_scaling = query.shape[-1] ** -0.5
    scaling = usual_scaling if scaling is None else scaling
    if cu_seqlens is not None:
        query = query if scaling == usual_scaling else query * (scaling / usual_scaling)
        query, key = query.to(value.dtype), key.to(value.dtype)  # which some families turn by positions in float32
        # (width, heads, head size); squeeze's backward is a view, that of states[0] would allocate zeros
        query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
        window: Any = {} if sliding_window is None else {"window_size": (sliding_window - 1, sliding_window - 1)}
        output = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **window)
        return cast(Tensor, output)[None], None
    mask: Tensor | None
    if masks is not None:
        mask = masks[sliding_window]
    else:
        assert attention_mask is None, "padding is told by segment ids"
        mask = None if sliding_window is None else _is_within(sliding_window, query.shape[2], query.device)[None, None]
    if mask is not None and mask.is_floating_point():
        scores = (query * scaling) @ key.mT + mask  # (rows, heads, width, width)
        weights = F.dropout(scores.softmax(-1), attention_dropout)
        return (weights @ value).transpose(1, 2), None
    output = F.scaled_dot_product_attention(query, key, value, mask, attention_dropout, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register("packed", attend)
