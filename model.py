"""The starting model, with random weights or a checkpoint's: as a masked language model, an encoder or a classifier.

How an encoder of any family takes packed chunks stands in mlm/encoder/.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    BertConfig,
    BertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from Config import SCRATCH_SIZES, Config
from mlm.encoder.dropout import set_dropout
from mlm.encoder.families import freeze_key_biases, longest_input, why_not_served
from mlm.errors import UserError
from mlm.runtime.pretrained import load_encoder_config, load_weights

ROUNDED_UP = 128  # some models have a multiple of 64 or 128 rows, the last of which are no token's


def load_model(
    config: Config,
    vocabulary_size: int,
    pad_id: int,
    checkpoint: Path | None = None,
    added: dict[int, list[int]] | None = None,
    count_tokens: Callable[[], np.ndarray] | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Loads the model in the folder `checkpoint`, or else the one that `initial_pretrain_model` names, in float32.

    added: the ids of the subwords of each word that was added to the vocabulary, by its id; a checkpoint knows them.
    count_tokens: returns how often each token occurs in the training text, (vocabulary,); a new head begins with that.
    The pooler comes along untrained, so that a fine-tuned task starts from it. The dropout of Config.py is set on the
    modules; the model's config, which is saved, keeps the model's own for whoever fine-tunes it.
    Returns the model and warnings about it. Raises UserError where the checkpoint is missing or of no family that is
    served, or does not fit the tokenizer or `sen_max_length`.
    """
    name = str(checkpoint or config.initial_pretrain_model)
    size = SCRATCH_SIZES[config.scratch_size] if config.scratch_size and not checkpoint else None
    if size:
        model_config = _config_of_size(size, vocabulary_size, pad_id)
    else:
        model_config = load_served_config(name, "initial_pretrain_model")
    of_model = vocabulary_size if size or checkpoint else vocabulary_size - len(added or {})
    warnings = _check_vocabulary(config, model_config, of_model)
    torch.manual_seed(config.seed)  # of all weights, or of a head that the checkpoint lacks
    if size:
        model, is_head_new = BertForMaskedLM(model_config), True
    else:
        model, is_head_new, of_weights = _pretrained_model(name)
        warnings += of_weights
    if config.sen_max_length > longest_input(model):
        raise UserError(
            f"sen_max_length, initial_pretrain_model: chunks of {config.sen_max_length} tokens do not fit the "
            f"{longest_input(model)} positions of {config.initial_pretrain_model}"
        )
    if not checkpoint and added:
        _add_embeddings(model, vocabulary_size, added)
    if not checkpoint and is_head_new and count_tokens:
        _expect_frequencies(model, count_tokens())
    if not set_dropout(model, config.hidden_dropout) and config.hidden_dropout:
        warnings.append(f"warning: hidden_dropout: a model of type {model_config.model_type} has no place for dropout")
    freeze_key_biases(model)
    return model, warnings


def load_served_config(name: str, setting: str) -> PreTrainedConfig:
    """Loads a checkpoint's config. Raises UserError, which names the setting, where it is missing, or is of a family
    that cannot be trained here."""
    config = load_encoder_config(name, setting)
    if reason := why_not_served(config):
        raise UserError(f"{setting}: {name} is no encoder that can be trained here, but {reason}")
    return config


def starting_config(config: Config) -> PreTrainedConfig:
    """Returns the config of the model that a run starts from, as far as it does not depend on the vocabulary. Raises
    UserError as `load_served_config`."""
    if config.scratch_size:
        return _config_of_size(SCRATCH_SIZES[config.scratch_size], 1, 0)
    return load_served_config(config.initial_pretrain_model, "initial_pretrain_model")


def _config_of_size(size, vocabulary_size, pad_id):
    return BertConfig(
        vocab_size=vocabulary_size,
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.hidden // 64,
        intermediate_size=4 * size.hidden,
        pad_token_id=pad_id,
    )


def _pretrained_model(name):
    """Returns the model in a folder or on the Hub, with its pooler; whether its head is new; and warnings."""
    model, is_head_new, warnings = load_masked_lm(name, "initial_pretrain_model")
    if is_head_new:
        warnings.append(
            f"warning: {name} has no masked-language-model head. A random one takes its place, so the scores before "
            "training say nothing of the encoder, and the head must be learned before it can teach the rest. Most "
            "sentence-embedding and fine-tuned models have none; the checkpoint they were made from usually has it"
        )
    if hasattr(model.base_model, "pooler"):  # which a masked language model leaves empty
        kind = MODEL_MAPPING[type(model.config)]
        encoder, missing, _ = load_weights(kind, name, "initial_pretrain_model", add_pooling_layer=True)
        if not any(key.startswith("pooler") for key in missing):
            model.base_model.pooler = encoder.pooler.requires_grad_(False)
            if hasattr(encoder, "pooler_activation"):  # ALBERT's is a part by itself
                model.base_model.pooler_activation = encoder.pooler_activation
    return model, is_head_new, warnings


@torch.no_grad()
def _expect_frequencies(model, counts):
    """Begins the bias of a new head at the logarithms of the tokens' shares, each count raised by one, so that it need
    not learn what is frequent (Meister et al., A Natural Bias for Language Generation Models, arXiv 2212.09686)."""
    bias = model.get_output_embeddings().bias  # (rows,): the tokens, and rows to spare
    if bias is None:
        return
    shares = torch.ones(len(bias), dtype=torch.float64)
    shares[: len(counts)] += torch.from_numpy(counts)
    bias.copy_((shares / shares.sum()).log())


def load_masked_lm(name: str, setting: str) -> tuple[PreTrainedModel, bool, list[str]]:
    """Loads a checkpoint with its masked-token head. Returns the model, whether the head is new as the checkpoint has
    none, or a part of one, and warnings about weights that are not used. Raises UserError as `load_weights`."""
    kind = MODEL_FOR_MASKED_LM_MAPPING[type(load_served_config(name, setting))]
    model, missing, warnings = load_weights(kind, name, setting)
    return model, not all(key.startswith(f"{model.base_model_prefix}.") for key in missing), warnings


@torch.no_grad()
def _add_embeddings(model, vocabulary_size, added):
    """Gives each added word the mean of its subwords' rows and biases, in and out; the rows of the others stay."""
    if vocabulary_size > model.config.vocab_size:  # else the model has rows to spare
        model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    inputs = model.get_input_embeddings().weight  # (vocabulary, hidden)
    outputs = model.get_output_embeddings().weight  # most often the same
    bias = model.get_output_embeddings().bias  # (vocabulary,), or None
    for row, subwords in added.items():
        for weights in (inputs, outputs, *([] if bias is None else [bias])):
            weights[row] = weights[subwords].mean(0)


def _check_vocabulary(config, model_config, vocabulary_size):
    """Returns a note on rows that no token uses. Raises UserError where a token has no row, or so many rows have no
    token that they are another vocabulary's."""
    names = config.initial_pretrain_tokenizer, config.initial_pretrain_model
    rows, spare = model_config.vocab_size, model_config.vocab_size - vocabulary_size
    if names[0] == names[1] and spare < 0:
        raise UserError(
            f"initial_pretrain_tokenizer, initial_pretrain_model: the tokenizer of {names[0]} has {vocabulary_size:,} "
            f"tokens, the model {rows:,} rows for them; after tokens are added, model.resize_token_embeddings is due"
        )
    if names[0] != names[1] and not 0 <= spare < ROUNDED_UP:
        raise UserError(
            f"initial_pretrain_tokenizer, initial_pretrain_model: {names[0]} has {vocabulary_size:,} tokens, "
            f"{names[1]} {rows:,}; they do not belong together. Set both to the same name"
        )
    return [f"note: {spare:,} of the {rows:,} rows of {names[1]} are no token's"] if spare >= ROUNDED_UP else []


def load_encoder(name: str) -> tuple[PreTrainedModel, list[str]]:
    """Loads a model that `models` names, without a head; a pooler that it lacks is always the same. Returns warnings
    about weights that are not used, too. Raises UserError where its family is not served, or it lacks other weights."""
    kind = MODEL_MAPPING[type(load_served_config(name, "models"))]
    torch.manual_seed(0)
    model, _, warnings = load_weights(kind, name, "models")
    return model, warnings


def load_classifier(name: str, classes: int, seed: int, of_words: bool) -> PreTrainedModel:
    """Loads a model that `models` names, with a new head for the classes of each text or of each word.

    The head is drawn from the seed, so that models of one width and family start from the same one; so is a pooler that
    the checkpoint lacks. Dropout is the checkpoint's own, but for none inside attention, which rules out fast kernels.
    Raises UserError where transformers has no such head for the family.
    """
    kinds = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING if of_words else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    config = load_served_config(name, "models")
    if type(config) not in kinds:
        raise UserError(f"models: transformers has no such classifier of type {config.model_type}, as {name} is")
    model, missing, _ = load_weights(kinds[type(config)], name, "models", num_labels=classes)
    torch.manual_seed(seed)
    for layer in _new_layers(model, missing):  # drawn as BERT's are, whatever the checkpoint's config says
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    set_dropout(model, None)
    return model


def _new_layers(model: PreTrainedModel, missing: list[str]) -> list[Any]:
    """Returns the linear layers that the checkpoint lacks: the classifier first, then others of the head, and the
    pooler."""
    names = sorted({key.rpartition(".")[0] for key in missing}, key=lambda name: (name != "classifier", name))
    layers = [model.get_submodule(name) for name in names]
    return [layer for layer in layers if isinstance(layer, nn.Linear)]
