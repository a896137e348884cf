"""BERT on packed chunks: block-diagonal or variable-length attention, and logits at the masked positions alone.

The starting model is loaded as BertForMaskedLM; for downstream.py also as a classifier of texts or of words.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertForMaskedLM, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.bert import modeling_bert

from Config import SCRATCH_SIZES, Config
from mlm.errors import UserError
from mlm.runtime.pretrained import load_bert_config, load_weights

# Up to this width of rows, forward and backward in bfloat16 on a CPU are faster by plain operations than by torch's
# fused attention (benchmarks/RESULTS.md, "Attention on a CPU").
WIDEST_PLAIN_ATTENTION = 256
ROUNDED_UP = 128  # some models have a multiple of 64 or 128 rows, the last of which are no token's

Classifier = modeling_bert.BertForSequenceClassification | modeling_bert.BertForTokenClassification


class PackedBert(nn.Module):
    """A BERT whose forward takes packed rows; subclasses add a head. A module, as DistributedDataParallel wraps
    `forward` alone."""

    def __init__(self, bert: modeling_bert.BertPreTrainedModel, sep_id: int | None = None):
        """sep_id: the id of [SEP], where a chunk may hold two texts."""
        super().__init__()
        self.bert, self.sep_id = bert, sep_id
        bert.set_attn_implementation("packed")
        for module in bert.modules():
            if isinstance(module, modeling_bert.BertSelfAttention):
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

        The ids are (rows, width). By a block-diagonal mask, (rows, 1, width, width), a position attends to its own
        segment id in its own row, so padding (id 0) to padding and no softmax is empty; or, for one row,
        variable-length attention takes `cu_seqlens` and `max_seqlen` instead (see `attend`).
        """
        assert (segment_ids is None) == (cu_seqlens is not None), "chunks are kept apart in one of two ways"
        mask = None if segment_ids is None else _block_diagonal(segment_ids)
        token_types = self._token_types(input_ids, position_ids)
        output = self.bert.base_model(
            input_ids, mask, token_types, position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        return self.head(output.last_hidden_state.flatten(0, 1)[label_positions])

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

    def head(self, hidden: Tensor) -> Tensor:
        """Returns the hidden states (targets, hidden) themselves, as features."""
        return hidden


class PackedMaskedLM(PackedBert):
    """BertForMaskedLM. The projection to the vocabulary, the largest matrix product of a small BERT, runs only where a
    token is predicted."""

    bert: BertForMaskedLM

    def head(self, hidden: Tensor) -> Tensor:
        """Returns logits (targets, vocabulary)."""
        return self.bert.cls(hidden)


class PackedClassifier(PackedBert):
    """BertForSequenceClassification, at each chunk's [CLS], or BertForTokenClassification."""

    bert: Classifier

    def head(self, hidden: Tensor) -> Tensor:
        """Returns logits (targets, classes) in float32: in 16 bits the likeliest classes would often tie."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, pooler = hidden.float(), self.bert.bert.pooler
            pooled = pooler(hidden[:, None]) if pooler else hidden  # a pooler takes the first of (targets, 1, hidden)
            return self.bert.classifier(self.bert.dropout(pooled))


def _cast_once(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Casts the input of query, key and value once: under autocast each of them would keep a copy of its own."""
    hidden, *others = inputs  # (rows, width, hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return (hidden, *others)


def _block_diagonal(segment_ids: Tensor) -> Tensor:
    """Returns which positions see which, (rows, 1, width, width), for segment ids (rows, width): those of one id. As 0
    and minus infinity, to be added to the scores, where plain attention is the faster; else as booleans."""
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    is_bfloat16_on_cpu = (
        mask.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    if is_bfloat16_on_cpu and torch.is_grad_enabled() and mask.shape[-1] <= WIDEST_PLAIN_ATTENTION:
        return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, float("-inf"))
    return mask


def attend(
    module, query, key, value, attention_mask, scaling, dropout=0.0, cu_seqlens=None, max_seqlen=None, **options
):
    """transformers' interface of an attention function: (rows, heads, width, head size) to (rows, width, heads, ...).

    With `cu_seqlens`, (chunks + 1,) int32, where each chunk of the one row begins and the last ends, and `max_seqlen`,
    the positions in the longest chunk: by variable-length kernels. Otherwise with a mask of `_block_diagonal`: by plain
    operations where it is to be added, else by torch's fused attention. Returns the output, and None in place of the
    attention weights.
    """
    if cu_seqlens is not None:
        # (width, heads, head size); squeeze's backward is a view, that of states[0] would allocate zeros
        query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
        return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)[None], None
    if attention_mask is not None and attention_mask.is_floating_point():
        scores = (query * scaling) @ key.mT + attention_mask  # (rows, heads, width, width)
        weights = F.dropout(scores.softmax(-1), dropout)  # dropout is 0 outside training
        return (weights @ value).transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )


AttentionInterface.register("packed", attend)
AttentionMaskInterface.register("packed", sdpa_mask)


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU with 16 random bits per element (so `p` in steps of 2**-16), in a third of the time."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns `hidden`, of any shape, in that shape."""
        if hidden.device.type != "cpu" or not (self.training and self.p):
            return super().forward(hidden)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2**16 possible draws
        in_fours = torch.empty(math.ceil(hidden.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        draws = in_fours.view(torch.int16)[: hidden.numel()].view(hidden.shape)  # uniform in [-2**15, 2**15)
        return torch.where(draws >= dropped - 2**15, hidden * (1 / (1 - dropped / 2**16)), 0.0)


def load_model(
    config: Config,
    vocabulary_size: int,
    pad_id: int,
    checkpoint: Path | None = None,
    added: dict[int, list[int]] | None = None,
    count_tokens: Callable[[], np.ndarray] | None = None,
) -> tuple[BertForMaskedLM, list[str]]:
    """Loads the model in the folder `checkpoint`, or else the one that `initial_pretrain_model` names, in float32.

    added: the ids of the subwords of each word that was added to the vocabulary, by its id; a checkpoint knows them.
    count_tokens: returns how often each token occurs in the training text, (vocabulary,); a new head begins with that.
    The pooler comes along untrained, so that a fine-tuned task starts from it. The dropouts of Config.py are set on the
    modules; the model's config, which is saved, keeps the model's own for whoever fine-tunes it.
    Returns the model and warnings about it. Raises UserError where the checkpoint is missing or not BERT, or does not
    fit the tokenizer or `sen_max_length`.
    """
    name = str(checkpoint or config.initial_pretrain_model)
    size = SCRATCH_SIZES[config.scratch_size] if config.scratch_size and not checkpoint else None
    bert_config = (
        _config_of_size(size, vocabulary_size, pad_id) if size else load_bert_config(name, "initial_pretrain_model")
    )
    warnings = _check_fit(
        config, bert_config, vocabulary_size if size or checkpoint else vocabulary_size - len(added or {})
    )
    torch.manual_seed(config.seed)  # of all weights, or of a head that the checkpoint lacks
    if size:
        model, is_head_new = BertForMaskedLM(bert_config), True
    else:
        model, is_head_new, of_weights = _pretrained_bert(name)
        warnings += of_weights
    if not checkpoint and added:
        _add_embeddings(model, vocabulary_size, added)
    if not checkpoint and is_head_new and count_tokens:
        _expect_frequencies(model, count_tokens())
    _set_dropouts(model, config.hidden_dropout, config.attention_dropout)
    for layer in model.bert.encoder.layer:
        # A softmax does not see a constant added to all its inputs, so this bias has no gradient but rounding noise,
        # which Adam would blow up into a random walk that differs between layouts.
        layer.attention.self.key.bias.requires_grad_(False)
    return model, warnings


def hidden_size(config: Config) -> int:
    """Returns the width of the model that a run starts from. Raises UserError where its config is missing or not
    BERT's."""
    if config.scratch_size:
        return SCRATCH_SIZES[config.scratch_size].hidden
    return load_bert_config(config.initial_pretrain_model, "initial_pretrain_model").hidden_size


def _config_of_size(size, vocabulary_size, pad_id):
    return BertConfig(
        vocab_size=vocabulary_size,
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.hidden // 64,
        intermediate_size=4 * size.hidden,
        pad_token_id=pad_id,
    )


def _pretrained_bert(name):
    """Returns the model in a folder or on the Hub, with its pooler; whether its head is new; and warnings."""
    model, is_head_new, warnings = load_masked_lm(name, "initial_pretrain_model")
    if is_head_new:
        warnings.append(
            f"warning: {name} has no masked-language-model head. A random one takes its place, so the scores before "
            "training say nothing of the encoder, and the head must be learned before it can teach the rest. Most "
            "sentence-embedding and fine-tuned models have none; the checkpoint they were made from usually has it"
        )
    encoder, missing, _ = load_weights(BertModel, name, "initial_pretrain_model")
    if not any(key.startswith("pooler") for key in missing):
        model.bert.pooler = encoder.pooler.requires_grad_(False)
    return model, is_head_new, warnings


@torch.no_grad()
def _expect_frequencies(model, counts):
    """Begins the bias of a new head at the logarithms of the tokens' shares, each count raised by one, so that it need
    not learn what is frequent (Meister et al., A Natural Bias for Language Generation Models, arXiv 2212.09686)."""
    bias = model.cls.predictions.bias  # (rows,): the tokens, and rows to spare
    shares = torch.ones(len(bias), dtype=torch.float64)
    shares[: len(counts)] += torch.from_numpy(counts)
    bias.copy_((shares / shares.sum()).log())


def load_masked_lm(name: str, setting: str) -> tuple[BertForMaskedLM, bool, list[str]]:
    """Loads a checkpoint with its masked-token head. Returns the model, whether the head is new as the checkpoint has
    none, or a part of one, and warnings about weights that are not used. Raises UserError as `load_weights`."""
    model, missing, warnings = load_weights(BertForMaskedLM, name, setting)
    return model, any(key.startswith("cls.predictions") for key in missing), warnings


def _set_dropouts(model, hidden_dropout, attention_dropout):
    """Sets dropout in the modules alone: inside attention, and outside, by the faster kind; None: the model's own."""
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, child_name, Dropout(child.p if hidden_dropout is None else hidden_dropout))
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = attention_dropout


@torch.no_grad()
def _add_embeddings(model, vocabulary_size, added):
    """Gives each added word the mean of its subwords' rows and biases, in and out; the rows of the others stay."""
    if vocabulary_size > model.config.vocab_size:  # else the model has rows to spare
        model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    inputs = model.get_input_embeddings().weight  # (vocabulary, hidden)
    outputs = model.get_output_embeddings().weight  # most often the same
    bias = model.cls.predictions.bias  # (vocabulary,)
    for row, subwords in added.items():
        for weights in (inputs, outputs, bias):
            weights[row] = weights[subwords].mean(0)


def _check_fit(config, bert_config, vocabulary_size):
    """Returns a note on rows that no token uses. Raises UserError where a token has no row, or so many rows have no
    token that they are another vocabulary's, or where chunks are longer than the model can see."""
    names = config.initial_pretrain_tokenizer, config.initial_pretrain_model
    rows, spare = bert_config.vocab_size, bert_config.vocab_size - vocabulary_size
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
    if config.sen_max_length > bert_config.max_position_embeddings:
        raise UserError(
            f"sen_max_length, initial_pretrain_model: chunks of {config.sen_max_length} tokens do not fit the "
            f"{bert_config.max_position_embeddings} positions of {config.initial_pretrain_model}"
        )
    return [f"note: {spare:,} of the {rows:,} rows of {names[1]} are no token's"] if spare >= ROUNDED_UP else []


def load_encoder(name: str) -> tuple[BertModel, list[str]]:
    """Loads a model that `models` names, without a head; a pooler that it lacks is always the same. Returns warnings
    about weights that are not used, too. Raises UserError where it is no BERT, or lacks other weights."""
    load_bert_config(name, "models")
    torch.manual_seed(0)
    model, _, warnings = load_weights(BertModel, name, "models")
    return model, warnings


def load_classifier(name: str, classes: int, seed: int, of_words: bool) -> Classifier:
    """Loads a model that `models` names, with a new head for the classes of each text or of each word.

    The head is drawn from the seed, so that models of one width start from the same one; so is a pooler that the
    checkpoint lacks. Dropout is the checkpoint's own, but for none inside attention, which rules out fast kernels.
    """
    kind = modeling_bert.BertForTokenClassification if of_words else modeling_bert.BertForSequenceClassification
    model, missing, _ = load_weights(kind, name, "models", num_labels=classes)
    new_layers = [model.classifier]
    if any("pooler" in key for key in missing):
        new_layers.append(model.bert.pooler.dense)
    torch.manual_seed(seed)
    for linear in new_layers:  # drawn as BERT's are, whatever the checkpoint's config says: all heads start alike
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    _set_dropouts(model, None, 0.0)
    return model
