"""Law 10 for checkpoints and tokenizers that nobody foresaw: loaded whole, or refused in one line."""

import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings, strategies
from safetensors.torch import load_file, save_file
from texts import make_lines
from transformers import BertConfig, BertForMaskedLM

from Config import Config
from mlm.data.tokenizer import learn_tokenizer, load_tokenizer, read_vocabulary
from mlm.errors import UserError
from model import load_encoder, load_model

EXAMPLES = int(os.environ.get("EXAMPLES", 60))
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
CONTENTS = [b"", b"{", b"{}", b"[]", b"null", b"\xff\xfe\x00", b"<html></html>", b"version https://git-lfs.github.com/spec/v1\n",
            b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", pickle.dumps({"a": 1})]  # fmt: skip
VALUES = [None, 0, -1, 1, 3, 7, 10**9, 1.5, "", "bert", "roberta", "gelu", "x", True, False, [], {}, ["BertModel"],
          {"AutoModel": "a.B"}, float("nan")]  # fmt: skip
PREFIXES = ["module.", "model.", "bert.", "encoder.", ""]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    tokenizer = learn_tokenizer(lambda: iter(make_lines(100)), 120)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def damage(folder, draw):
    """Changes one thing about a checkpoint."""
    way = draw(strategies.sampled_from(["file", "cut", "missing", "entry", "weight", "names", "other format", "words"]))
    if way == "file":
        (folder / draw(strategies.sampled_from(FILES))).write_bytes(draw(strategies.sampled_from(CONTENTS)))
    elif way == "cut":
        path = folder / draw(strategies.sampled_from(FILES))
        content = path.read_bytes() if path.exists() else b""
        path.write_bytes(content[: draw(strategies.integers(0, len(content)))])
    elif way == "missing":
        (folder / draw(strategies.sampled_from(FILES))).unlink(missing_ok=True)
    elif way == "entry":
        path = folder / draw(strategies.sampled_from(["config.json", "tokenizer_config.json", "tokenizer.json"]))
        try:
            content = json.loads(path.read_bytes())
            name = draw(
                strategies.sampled_from([*content, "auto_map", "is_decoder", "tokenizer_class", "do_lower_case"])
            )
        except (OSError, ValueError, TypeError):
            return
        content[name] = draw(strategies.sampled_from(VALUES))
        if draw(strategies.booleans()):
            del content[name]
        path.write_text(json.dumps(content))
    elif way == "words":
        lines = (folder / "vocab.txt").read_bytes().split(b"\n") if (folder / "vocab.txt").exists() else [b"a"]
        (folder / "vocab.txt").write_bytes(
            b"\n".join(draw(strategies.permutations(lines))[: draw(strategies.integers(0, 99))])
        )
        for name in draw(
            strategies.sampled_from([(), ("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
        ):
            (folder / name).unlink(missing_ok=True)
    else:
        damage_weights(folder, way, draw)


def damage_weights(folder, way, draw):
    try:
        weights = load_file(folder / "model.safetensors")
        chosen = draw(strategies.sampled_from(sorted(weights)))
    except Exception:  # damaged before
        return
    if way == "names":
        prefix = draw(strategies.sampled_from(PREFIXES))
        if draw(strategies.booleans()):
            weights = {prefix + name: weight for name, weight in weights.items()}
        else:
            weights = {name.replace("bert.", prefix, 1): weight for name, weight in weights.items()}
    elif way == "weight":
        changed = weights.pop(chosen)
        value = draw(strategies.sampled_from([None, float("nan"), float("inf"), "narrow", "half", "other name"]))
        if value == "narrow":
            weights[chosen] = changed[..., : max(1, changed.shape[-1] // 2)].contiguous()
        elif value == "half":
            weights[chosen] = changed.half()
        elif value == "other name":
            weights[chosen.replace("query", "Wq").replace("weight", "gamma").replace("bias", "beta")] = changed
        elif value is not None:
            changed.view(-1)[0] = value
            weights[chosen] = changed
    else:
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / draw(strategies.sampled_from(["pytorch_model.bin", "model.pt", "tf_model.h5"])))
        return
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def stored_weights(folder):
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "pytorch_model.bin")


def is_loaded(encoder, weights) -> bool:
    """Whether each weight of an encoder is what the file has under its name, or under one of older versions."""
    for name, parameter in encoder.named_parameters():
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        names = {prefix + each for each in (name, older) for prefix in ("", "bert.")}
        if not name.startswith("pooler") and not any(
            torch.equal(parameter, weights[each].float()) for each in names & {*weights}
        ):
            return False
    return True


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=strategies.data())
def test_any_checkpoint_is_loaded_whole_or_refused_in_one_line(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any") / "checkpoint"
    shutil.copytree(whole, folder)
    for _ in range(data.draw(strategies.integers(1, 3))):
        damage(folder, data.draw)
    name = str(folder)
    config = Config(
        initial_pretrain_model=name, initial_pretrain_tokenizer=str(data.draw(strategies.sampled_from([folder, whole])))
    )
    for program in ("train.py", "downstream.py"):
        try:
            if program == "train.py":
                vocabulary = read_vocabulary(load_tokenizer(config, lambda: iter(()), ""))
                encoder = load_model(config, vocabulary.size, vocabulary.pad_id)[0].bert
            else:
                encoder, _ = load_encoder(name)
            event(f"{program} loads")
        except UserError as refused:
            [line] = str(refused).splitlines()
            assert line.partition(": ")[0] in ("models", "initial_pretrain_model", "initial_pretrain_tokenizer",
                                               "initial_pretrain_tokenizer, initial_pretrain_model",
                                               "sen_max_length, initial_pretrain_model"), line  # fmt: skip
            event(f"{program} refuses")
            continue
        assert all(weight.isfinite().all() for weight in encoder.parameters())
        assert is_loaded(encoder, stored_weights(folder))
