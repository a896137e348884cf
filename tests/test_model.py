"""Law 3: lines never see each other. Law 7: what comes out is plain BERT. Law 8: what does not fit is refused."""

import copy
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import IGNORED, attention_by_chunks, labelled, pad, score
from runs import micro_batcher_of, train_on
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    pipeline,
)

from mlm.data.masking import BERT_RULE, mask
from mlm.data.packing import WIDTH_STEP, frame, pack, split_rows
from mlm.encoder.attention import WIDEST_PLAIN_ATTENTION
from mlm.encoder.dropout import Dropout
from mlm.encoder.packed import PackedMaskedLM
from mlm.errors import UserError
from mlm.randomness import random_bits
from mlm.training.checkpoint import save_model
from model import load_model

CPU = torch.device("cpu")


def bert_config(vocabulary, **changes):
    values = {
        "vocab_size": vocabulary.size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**values | changes)


def checkpoint(folder, tokenizer, model):
    """A checkpoint folder as a user would have it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=[False, True], ids=["mask", "varlen"])
def varlen(request, monkeypatch):
    """Without and with variable-length attention, whose kernels, for want of a GPU, are loops of torch's attention."""
    monkeypatch.setattr("mlm.encoder.attention.varlen_attn", attention_by_chunks)
    return request.param


@pytest.mark.parametrize("micro_batch_tokens", [1, 100, 1000, 100_000])
def test_packed_loss_and_gradients_equal_the_padded_stock_models(vocabulary, varlen, micro_batch_tokens):
    torch.manual_seed(0)
    stock = BertForMaskedLM(bert_config(vocabulary))
    ours = BertForMaskedLM(bert_config(vocabulary))
    ours.load_state_dict(stock.state_dict())
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 60, 40)
    tokens = draw.choice(vocabulary.regular_ids, lengths.sum())
    hidden = mask(tokens, lengths, random_bits(0, np.arange(40)), vocabulary, BERT_RULE)
    padded = pad(*hidden, lengths, vocabulary)
    expected = score(stock, padded)
    expected.loss.backward()

    pieces = micro_batcher_of(vocabulary, micro_batch_tokens, varlen)(frame(*hidden, lengths, vocabulary))
    positions = sum(inputs["input_ids"].numel() for inputs, _ in pieces)
    assert positions < 0.8 * padded.input_ids.numel()  # packed indeed
    if varlen:
        assert positions == lengths.sum() + 2 * 40  # nothing is padded
        sizes = [inputs["input_ids"].numel() for inputs, _ in pieces]
        alone = [len(inputs["cu_seqlens"]) == 2 for inputs, _ in pieces]
        assert all(size <= micro_batch_tokens or one for size, one in zip(sizes, alone, strict=True))
    loss = train_on(PackedMaskedLM(ours), pieces, expected.masked_tokens)
    assert loss == pytest.approx(expected.loss.item(), abs=1e-5)
    for (name, parameter), (_, reference) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_chunk_cannot_see_its_neighbour(vocabulary):
    model = PackedMaskedLM(BertForMaskedLM(bert_config(vocabulary)).eval())
    draw = np.random.default_rng(1)
    lengths = np.array([10, 8])
    tokens = draw.choice(vocabulary.regular_ids, 18)

    def logits(tokens):
        chunks = frame(tokens, np.arange(10), tokens[:10], lengths, vocabulary)  # predict the first
        (inputs, _), *rest = micro_batcher_of(vocabulary)(chunks)
        assert not rest and inputs["input_ids"].shape == (1, 32)  # 22 positions and padding
        return model(**inputs)

    changed = np.concatenate([tokens[:10], draw.choice(vocabulary.regular_ids, 8)])
    torch.testing.assert_close(logits(tokens), logits(changed), atol=1e-6, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(tokens), logits(changed), atol=0, rtol=0)


@pytest.mark.parametrize("longest", [60, WIDEST_PLAIN_ATTENTION], ids=["plain", "fused"])
def test_bfloat16_on_a_cpu_trains_as_the_stock_model_in_float32(vocabulary, longest, monkeypatch):
    """Narrow rows go by plain operations, wide ones by torch's fused attention: both within bfloat16's rounding."""
    torch.manual_seed(0)
    stock = BertForMaskedLM(bert_config(vocabulary))
    for name, weights in stock.named_parameters():
        if "query.weight" in name or "key.weight" in name:
            weights.data *= 30  # so that attention is far from even
    ours = copy.deepcopy(stock)
    draw = np.random.default_rng(0)
    lengths = np.array([longest, *draw.integers(1, 60, 40)])
    tokens = draw.choice(vocabulary.regular_ids, lengths.sum())
    hidden = mask(tokens, lengths, random_bits(0, np.arange(41)), vocabulary, BERT_RULE)
    expected = score(stock, pad(*hidden, lengths, vocabulary))
    expected.loss.backward()

    [(inputs, wanted)] = micro_batcher_of(vocabulary)(frame(*hidden, lengths, vocabulary))
    fused = Mock(side_effect=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(PackedMaskedLM(ours)(**inputs), wanted)
    loss.backward()
    assert bool(fused.mock_calls) == (inputs["input_ids"].shape[1] > WIDEST_PLAIN_ATTENTION) == (longest > 60)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=2e-3)
    for name in ("query.weight", "key.weight", "value.weight"):
        gradient, reference = (
            torch.cat([p.grad.flatten() for n, p in bert.named_parameters() if n.endswith(name)])
            for bert in (ours, stock)
        )
        assert ((gradient - reference).norm() / reference.norm()).item() < 0.06, name


def test_pack_places_every_chunk_once_between_its_own_cls_and_sep(vocabulary):
    draw = np.random.default_rng(2)
    lengths = draw.integers(1, 120, 300)
    tokens = draw.choice(vocabulary.regular_ids, lengths.sum())
    batch = pack(frame(tokens, np.arange(len(tokens)), tokens, lengths, vocabulary), 256, vocabulary)
    _, labels = labelled(batch.input_ids, batch.label_positions, batch.targets)
    found = []
    for row in range(len(labels)):
        for sequence in np.setdiff1d(batch.segment_ids[row], 0):
            inside = np.flatnonzero(batch.segment_ids[row] == sequence)
            assert np.array_equal(inside, np.arange(inside[0], inside[-1] + 1))
            assert np.array_equal(batch.position_ids[row, inside], np.arange(len(inside)))
            ids = batch.input_ids[row, inside].tolist()
            assert ids[0] == vocabulary.cls_id and ids[-1] == vocabulary.sep_id
            assert labels[row, inside].tolist() == [IGNORED, *ids[1:-1], IGNORED]
            found.append(tuple(ids[1:-1]))
    ends = np.cumsum(lengths)
    assert sorted(found) == sorted(tuple(tokens[end - n : end].tolist()) for end, n in zip(ends, lengths, strict=True))
    padding = batch.segment_ids == 0
    assert (batch.input_ids[padding] == vocabulary.pad_id).all() and (labels[padding] == IGNORED).all()
    assert labels.shape[1] < 256 + lengths.max() + 2 + WIDTH_STEP and padding.mean() < 0.07
    assert labels.shape[1] % WIDTH_STEP == 0


def test_short_chunks_leave_little_padding(vocabulary):
    lengths = np.random.default_rng(3).integers(12, 38, 32)
    tokens = np.full(lengths.sum(), vocabulary.unk_id)
    chunks = frame(tokens, np.arange(len(tokens)), tokens, lengths, vocabulary)
    padding = pack(chunks, 256, vocabulary).segment_ids == 0
    assert padding.mean() < 0.02 + WIDTH_STEP / 256


def test_rows_are_cut_evenly(vocabulary):
    lengths, tokens = np.full(10, 98), np.full(980, vocabulary.unk_id)
    rows = pack(frame(tokens, np.arange(980), tokens, lengths, vocabulary), 200, vocabulary)
    assert rows.input_ids.shape == (5, 208)  # 200 and padding to a multiple of 16
    cuts = ((1040, [5]), (1039, [3, 2]), (832, [3, 2]), (416, [2, 2, 1]), (415, [1] * 5), (1, [1] * 5))
    for positions, parts in cuts:
        cut = list(split_rows(rows, positions))
        assert [len(part.input_ids) for part in cut] == parts
        assert [len(part.targets) for part in cut] == [196 * part for part in parts]


def test_dropout_drops_its_share_and_scales_the_rest():
    dropout, ones = Dropout(0.1), torch.ones(1001, 333, requires_grad=True)  # an odd number, as four share their bits
    torch.manual_seed(1)
    dropped = dropout(ones)
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped)
    share, sigma = (dropped == 0).float().mean().item(), (0.1 * 0.9 / ones.numel()) ** 0.5
    assert abs(share - 0.1) < 4 * sigma
    assert dropped[dropped > 0].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4)
    gaps = (dropped[:, :-1] == 0) & (dropped[:, 1:] == 0)  # neighbours are independent
    assert abs(gaps.float().mean().item() - 0.01) < 1e-3
    torch.manual_seed(1)
    assert torch.equal(dropout(ones), dropped) and not torch.equal(dropout(ones), dropped)
    assert dropout(ones.bfloat16()).dtype == torch.bfloat16
    assert dropout.eval()(ones) is ones and Dropout(0.0)(ones) is ones


def test_pack_of_nothing_gives_a_zero_loss(vocabulary, varlen):
    nothing = np.zeros(0, dtype=np.int64)
    chunks = frame(nothing, nothing, nothing, nothing, vocabulary)
    [(inputs, targets)] = micro_batcher_of(vocabulary, varlen=varlen)(chunks)
    model = BertForMaskedLM(bert_config(vocabulary))
    loss = F.cross_entropy(PackedMaskedLM(model)(**inputs), targets, reduction="sum")
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_the_folder_that_comes_out_is_plain_bert(tmp_path, settings, tokenizer, vocabulary):
    config = bert_config(vocabulary, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, layer_norm_eps=1e-7)
    start = BertForPreTraining(config)
    folder = checkpoint(tmp_path / "start", tokenizer, start)
    model, warnings = load_model(
        settings(initial_pretrain_model=folder, initial_pretrain_tokenizer=folder, hidden_dropout=0.05),
        vocabulary.size,
        vocabulary.pad_id,
    )
    assert not warnings
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {*dropouts.values()} == {0.05}  # that inside attention is told with every call

    save_model(tmp_path / "out", model, tokenizer)
    assert not list((tmp_path / "out").glob("*.bin")) and (tmp_path / "out" / "model.safetensors").is_file()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((tmp_path / "start" / "config.json").read_text())
    assert saved.pop("architectures") == ["BertForMaskedLM"] and original.pop("architectures")
    assert saved == original
    vocab = (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert vocab == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    for kind in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        _, loading = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not [key for key in loading["missing_keys"] if not key.startswith("classifier")]
    encoder = BertModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(encoder.pooler.dense.weight, start.bert.pooler.dense.weight)
    guesses = pipeline("fill-mask", model=str(tmp_path / "out"))("the patient was given [MASK]")
    assert len(guesses) == 5


def test_missing_head_is_said_loudly_and_a_missing_pooler_stays_missing(tmp_path, settings, tokenizer, vocabulary):
    folder = checkpoint(tmp_path / "encoder", tokenizer, BertModel(bert_config(vocabulary), add_pooling_layer=False))
    config = settings(initial_pretrain_model=folder, initial_pretrain_tokenizer=folder)
    model, [warning] = load_model(config, vocabulary.size, vocabulary.pad_id)
    assert "has no masked-language-model head" in warning
    assert model.bert.pooler is None


def test_weights_are_trained_in_float32_whatever_they_were_saved_in(tmp_path, settings, tokenizer, vocabulary):
    folder = checkpoint(tmp_path / "half", tokenizer, BertForMaskedLM(bert_config(vocabulary)).to(torch.bfloat16))
    config = settings(initial_pretrain_model=folder, initial_pretrain_tokenizer=folder)
    model, _ = load_model(config, vocabulary.size, vocabulary.pad_id)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def with_rows(folder, tokenizer, vocabulary, extra):
    """A checkpoint with so many more rows than its tokenizer has tokens."""
    config = bert_config(vocabulary, vocab_size=vocabulary.size + extra)
    return checkpoint(folder, tokenizer, BertForMaskedLM(config))


@pytest.mark.parametrize("extra", [-1, 128])
def test_a_vocabulary_that_does_not_fit_names_both_settings(tmp_path, settings, tokenizer, vocabulary, extra):
    folder = with_rows(tmp_path / "other", tokenizer, vocabulary, extra)
    with pytest.raises(UserError, match=r"initial_pretrain_model: another has .* do not belong together"):
        config = settings(initial_pretrain_model=folder, initial_pretrain_tokenizer="another")
        load_model(config, vocabulary.size, vocabulary.pad_id)


@pytest.mark.parametrize("extra", [0, 127, 128, 1000])
def test_rows_that_no_token_uses_are_a_note_where_both_names_are_one(tmp_path, settings, tokenizer, vocabulary, extra):
    """As of dbmdz's Italian BERTs and of IndoBERT."""
    folder = with_rows(tmp_path / "roomy", tokenizer, vocabulary, extra)
    config = settings(initial_pretrain_model=folder, initial_pretrain_tokenizer=folder)
    model, warnings = load_model(config, vocabulary.size, vocabulary.pad_id)
    assert model.get_input_embeddings().num_embeddings == vocabulary.size + extra
    rows = f"note: {extra:,} of the {vocabulary.size + extra:,} rows of {folder} are no token's"
    assert warnings == ([rows] if extra >= 128 else [])


def test_a_token_that_was_added_without_a_row_is_said(tmp_path, settings, tokenizer, vocabulary):
    folder = with_rows(tmp_path / "narrow", tokenizer, vocabulary, -1)
    config = settings(initial_pretrain_model=folder, initial_pretrain_tokenizer=folder)
    with pytest.raises(UserError, match=r"tokens, the model \d+ rows .*model\.resize_token_embeddings is due"):
        load_model(config, vocabulary.size, vocabulary.pad_id)


def test_chunks_longer_than_the_positions_are_refused(settings, vocabulary):
    with pytest.raises(UserError, match=r"sen_max_length, initial_pretrain_model: .* 600 .* 512 positions"):
        load_model(settings(sen_max_length=600), vocabulary.size, vocabulary.pad_id)


@pytest.mark.parametrize("wrong", ["deberta", "no weights", "no config", "broken config", "broken weights"])
def test_what_is_not_served_or_not_whole_is_refused(tmp_path, settings, tokenizer, vocabulary, wrong):
    folder = tmp_path / "wrong"
    if wrong == "deberta":
        checkpoint(folder, tokenizer, DebertaV2ForMaskedLM(DebertaV2Config(**bert_config(vocabulary).to_diff_dict())))
    else:
        checkpoint(folder, tokenizer, BertForMaskedLM(bert_config(vocabulary)))
    if wrong == "no weights":
        (folder / "model.safetensors").unlink()
    if wrong == "no config":
        (folder / "config.json").unlink()
    if wrong == "broken config":
        (folder / "config.json").write_text("{")
    if wrong == "broken weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"^initial_pretrain_model: .*wrong"):
        config = settings(initial_pretrain_model=str(folder), initial_pretrain_tokenizer=str(folder))
        load_model(config, vocabulary.size, vocabulary.pad_id)


def test_vocab_txt_keeps_ids_where_some_are_missing(tmp_path, tokenizer, vocabulary):
    gappy = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "b": 7})
    save_model(tmp_path / "out", BertForMaskedLM(bert_config(vocabulary, vocab_size=8)), gappy)
    assert (tmp_path / "out" / "vocab.txt").read_text().splitlines()[5:] == ["a", "[unused-id-6]", "b"]


def test_sizes_from_scratch_are_the_published_ones(settings, vocabulary):
    # Millions of parameters with BERT's vocabulary of 30,522, MLM head and pooler (arXiv 1908.08962, table 1).
    for size, millions in (("tiny", 4.4), ("mini", 11.3), ("small", 29.1), ("medium", 41.7), ("base", 110.1)):
        model, _ = load_model(settings(initial_pretrain_model=f"scratch:{size}"), 30_522, 0)
        hidden = model.config.hidden_size
        parameters = sum(parameter.numel() for parameter in model.parameters()) + hidden * (hidden + 1)
        assert parameters / 1e6 == pytest.approx(millions, abs=0.06)
