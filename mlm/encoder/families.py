"""What families of encoders differ in: which are served, where positions begin, how long a text may be, habits."""

import inspect
import re
from typing import Any, NamedTuple

from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel

KEY_BIAS = re.compile(r"\.(key|k_lin|k_proj)\.bias$")


class Habits(NamedTuple):
    """Settings that a family was pre-trained with, for those that are unset."""

    mlm_probability: float = 0.15  # in training; evaluations always mask 15%
    weight_decay: float = 0.01


USUAL = Habits()
# ModernBERT: Warner et al., Smarter, Better, Faster, Longer (arXiv 2412.13663).
HABITS = {"modernbert": Habits(mlm_probability=0.3, weight_decay=1e-5)}


def habits(config: PreTrainedConfig) -> Habits:
    """Returns the habits of the family that a model is of."""
    return HABITS.get(config.model_type, USUAL)


def why_not_served(config: PreTrainedConfig) -> str | None:
    """Returns what a model of that config is, where it cannot be trained here; None where it can."""
    if getattr(config, "is_decoder", False) or config.is_encoder_decoder:
        return "a decoder, or has one"
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return f"of type {config.model_type}, for which transformers has no masked language model"
    if not (hasattr(config, "hidden_size") and hasattr(config, "max_position_embeddings")):
        return f"of type {config.model_type}, which is no encoder of text alone"
    kind: Any = MODEL_FOR_MASKED_LM_MAPPING[type(config)]
    if not kind._supports_attention_backend:
        return f"of type {config.model_type}, whose attention is its own, so that packed lines would see each other"
    return None


def _absolute_positions(encoder: nn.Module) -> nn.Embedding | None:
    """Returns the embeddings of an encoder's positions, None where these are relative or rotary."""
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    return positions if isinstance(positions, nn.Embedding) else None


def first_position(encoder: nn.Module) -> int:
    """Returns the position id of a chunk's first position: behind that of padding, where that has one, as RoBERTa's."""
    positions = _absolute_positions(encoder)
    return 0 if positions is None or positions.padding_idx is None else positions.padding_idx + 1


def longest_input(model: PreTrainedModel) -> int:
    """Returns the positions of the longest chunk that a model can take."""
    return int(model.config.max_position_embeddings) - first_position(model.base_model)


def takes_token_types(encoder: nn.Module) -> bool:
    """Whether an encoder is told the type of each token."""
    return "token_type_ids" in inspect.signature(encoder.forward).parameters


def has_two_token_types(encoder: PreTrainedModel) -> bool:
    """Whether an encoder is told which of two texts a token is of. To others, as RoBERTa, separators alone say it."""
    return takes_token_types(encoder) and getattr(encoder.config, "type_vocab_size", 0) > 1


def head_size(config: Any) -> int:
    """Returns the units of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def freeze_key_biases(model: PreTrainedModel) -> None:
    """Keeps the biases of keys as they are where positions are absolute. A softmax does not see a constant added to all
    its inputs, so such a bias has no gradient but rounding noise, which Adam would blow up into a random walk that
    differs between layouts. Where positions turn the keys it does have one."""
    if _absolute_positions(model.base_model) is not None:
        for name, parameter in model.named_parameters():
            if KEY_BIAS.search(name):
                parameter.requires_grad_(False)
