"""Law 10: a checkpoint is what it says, or one line says why not. For train.py and for downstream.py."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel

from mlm.errors import UserError
from model import load_classifier, load_encoder, load_masked_lm, load_model

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def config(vocabulary):
    return BertConfig(vocab_size=vocabulary.size, **SHAPE)


@pytest.fixture(scope="module")
def weights(config):
    """Of a masked language model, by name, as they are saved."""
    torch.manual_seed(0)
    state = BertForMaskedLM(config).state_dict()
    return {name: weight for name, weight in state.items() if "decoder" not in name}


@pytest.fixture
def checkpoint(tmp_path, tokenizer, config, weights):
    """A folder with everything, for a test to spoil."""
    folder = tmp_path / "checkpoint"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write(folder, weights)
    return folder


def write(folder, weights):
    state = {name: weight.clone().contiguous() for name, weight in weights.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder, **changes):
    """Changes entries of config.json; None takes one away."""
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


def refusal(load, *arguments):
    with pytest.raises(UserError) as refused:
        load(*arguments)
    [line] = str(refused.value).splitlines()
    return line


def fused(weights):
    """As MosaicBERT names them: query, key and value in one matrix."""
    kept = {name: weight for name, weight in weights.items() if not re.search("self.(query|key|value)", name)}
    return kept | {f"bert.encoder.layer.{layer}.attention.self.Wqkv.weight": torch.ones(96, 32) for layer in (0, 1)}


def renamed(pattern, replacement):
    return lambda weights: {re.sub(pattern, replacement, name): weight for name, weight in weights.items()}


def without(pattern):
    return lambda weights: {name: weight for name, weight in weights.items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("spoil", "number", "others"),
    [
        (renamed("^", "module."), "37", "module.bert.embeddings.LayerNorm.bias: they were saved from DataParallel"),
        (renamed("^bert", "model.bert"), "37", "model.bert.embeddings.LayerNorm.bias"),
        (renamed("^bert.encoder.layer", "encoder.transformer"), "32", "UER-py's"),
        (renamed("attention.self.query", "attn.q"), "4", "bert.encoder.layer.0.attn.q.bias"),
        (fused, "12", "bert.encoder.layer.0.attention.self.Wqkv.weight"),
        (without("layer.1"), "16", ""),
        (without("embeddings.position"), "1", ""),
        (lambda weights: {}, "37", ""),
    ],
    ids=["DataParallel", "nested", "UER-py", "own names", "MosaicBERT", "a layer", "positions", "nothing"],
)
def test_an_encoder_that_would_be_random_is_refused(checkpoint, weights, spoil, number, others):
    write(checkpoint, spoil(weights))
    for setting, load in (("initial_pretrain_model", load_masked_lm), ("models", lambda name, _: load_encoder(name))):
        line = refusal(load, str(checkpoint), setting)
        assert line.startswith(f"{setting}: {checkpoint} lacks {number} of BERT's weights, such as ") and others in line


def test_code_of_its_own_is_named_where_weights_are_missing(checkpoint, weights):
    write(checkpoint, fused(weights))
    change(checkpoint, auto_map={"AutoModelForMaskedLM": "bert_layers.BertForMaskedLM"})
    assert "code of its own (auto_map), which is not run" in refusal(load_encoder, str(checkpoint))


@pytest.mark.parametrize("changed", [{"intermediate_size": 128}, {"max_position_embeddings": 64}, {"hidden_size": 64}])
def test_a_config_of_other_weights_is_refused(checkpoint, changed):
    change(checkpoint, **changed)
    for load in (
        load_encoder,
        lambda name: load_masked_lm(name, "models"),
        lambda name: load_classifier(name, 2, 0, True),
    ):
        assert re.search(
            r"models: .* has the shape \(.*\) in its file and \(.*\) by its config.json", refusal(load, str(checkpoint))
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"])
def test_weights_that_are_not_finite_are_refused(checkpoint, weights, name, value):
    spoilt = weights[name].clone()
    spoilt.view(-1)[5] = value
    write(checkpoint, weights | {name: spoilt})
    assert f"not finite, in {name}" in refusal(load_masked_lm, str(checkpoint), "initial_pretrain_model")


def test_layers_that_the_config_leaves_out_are_said(checkpoint, settings, vocabulary):
    """Cutting layers off by an edit of config.json is done on purpose at times, so it is no error."""
    change(checkpoint, num_hidden_layers=1)
    expected = f"warning: 16 weights of {checkpoint} are not used, as its config.json has no place for them, such as "
    expected += "bert.encoder.layer.1.attention.output.LayerNorm.bias"
    start = settings(initial_pretrain_model=str(checkpoint), initial_pretrain_tokenizer=str(checkpoint))
    assert load_model(start, vocabulary.size, vocabulary.pad_id)[1] == [expected]
    assert load_encoder(str(checkpoint))[1] == [expected]


def test_usual_parts_beside_the_encoder_are_not_worth_a_word(tmp_path, config):
    """The next-sentence head, the pooler, position ids, and names of the first releases."""
    BertForPreTraining(config).save_pretrained(tmp_path)
    state = renamed("LayerNorm.weight", "LayerNorm.gamma")(load_file(tmp_path / "model.safetensors"))
    state = renamed("LayerNorm.bias", "LayerNorm.beta")(state)
    write(tmp_path, state | {"bert.embeddings.position_ids": torch.arange(512)[None]})
    model, is_head_new, warnings = load_masked_lm(str(tmp_path), "models")
    assert not is_head_new and not warnings and load_encoder(str(tmp_path))[1] == []
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, state["bert.embeddings.LayerNorm.gamma"])


@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_a_missing_head_is_told_from_one_that_is_there(tmp_path, config, checkpoint, weights, kind):
    kind(config).save_pretrained(tmp_path / "other")
    assert load_masked_lm(str(tmp_path / "other"), "models")[1]
    assert not load_masked_lm(str(checkpoint), "models")[1]
    write(checkpoint, without("predictions.transform.dense.weight")(weights))
    assert load_masked_lm(str(checkpoint), "models")[1]  # a part of one is none


@pytest.mark.parametrize("forgotten", ["model_type", "both", "tokenizer"])
def test_early_checkpoints_that_do_not_say_what_they_are_are_read_as_bert(checkpoint, settings, vocabulary, forgotten):
    """With vocab.txt alone, or without model_type, as Chinese-BERT-wwm and FinBERT were released."""
    from mlm.data.tokenizer import load_pretrained_tokenizer

    vocabulary_before = load_pretrained_tokenizer(str(checkpoint), "models").get_vocab()
    if forgotten != "tokenizer":
        change(checkpoint, model_type=None, architectures=None)
    if forgotten != "model_type":
        (checkpoint / "tokenizer.json").unlink()
        (checkpoint / "tokenizer_config.json").unlink()
        words = sorted(vocabulary_before, key=vocabulary_before.get)
        (checkpoint / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    start = settings(initial_pretrain_model=str(checkpoint), initial_pretrain_tokenizer=str(checkpoint))
    assert load_model(start, vocabulary.size, vocabulary.pad_id)[1] == []
    assert load_pretrained_tokenizer(str(checkpoint), "models").get_vocab() == vocabulary_before


class Code:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("model.safetensors", b"<html>", "cannot be loaded as BERT: .+"),
        ("model.safetensors", b"", "cannot be loaded as BERT: .+"),
        ("pytorch_model.bin", b"", "cannot be loaded as BERT: .+"),
        ("pytorch_model.bin", b"<html>", "holds more than weights, or is damaged"),
        ("pytorch_model.bin", pickle.dumps({"bert": Code()}), "holds more than weights, or is damaged"),
        ("tf_model.h5", b"x", "no file named model.safetensors"),
    ],
)
def test_files_that_are_no_weights_are_refused(checkpoint, capfd, name, content, said):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(content)
    line = refusal(load_encoder, str(checkpoint))
    assert re.search(said, line) and line.startswith(f"models: {checkpoint} ")
    assert "it ran" not in capfd.readouterr().out


def test_a_tensorflow_checkpoint_is_named(checkpoint):
    (checkpoint / "config.json").rename(checkpoint / "bert_config.json")
    (checkpoint / "model.safetensors").rename(checkpoint / "bert_model.ckpt.data-00000-of-00001")
    assert "a TensorFlow checkpoint (bert_config.json)" in refusal(load_encoder, str(checkpoint))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "roberta"}, "lacks 37 of roberta's weights, such as embeddings.LayerNorm.bias"),
        ({"model_type": "gpt2"}, "no encoder that can be trained here, but of type gpt2"),
        ({"model_type": "deberta-v2"}, "of type deberta-v2, whose attention is its own"),
        ({"model_type": "neobert"}, "knows no type neobert"),
        ({"model_type": "neobert", "auto_map": {"AutoModel": "a.B"}}, "code of its own (auto_map), which is not run"),
        ({"is_decoder": True}, "no encoder that can be trained here, but a decoder"),
        ({"hidden_size": "wide"}, "cannot be loaded as an encoder"),
        ({"num_attention_heads": 5}, "cannot be loaded as BERT"),
        ({"hidden_act": "magic"}, "cannot be loaded as BERT"),
    ],
)
def test_a_config_of_nothing_that_is_served_is_refused(checkpoint, changed, said):
    change(checkpoint, **changed)
    assert said in refusal(load_encoder, str(checkpoint))
