"""Law 7: no pickle and no custom class. What is loaded cannot run code, and nothing is sent anywhere."""

import json
import pickle
import socket
from pathlib import Path

import pytest
import torch
from runs import run
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from mlm.data.tokenizer import load_tokenizer
from mlm.errors import UserError
from model import load_model


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    folder = tmp_path / "start"
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def continued(settings, checkpoint):
    return settings(initial_pretrain_model=str(checkpoint), initial_pretrain_tokenizer=str(checkpoint))


class Attack:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_weights_that_are_a_program_are_refused(continued, checkpoint, vocabulary, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    attack = {"cls.predictions.bias": Attack(tmp_path / "mark")}
    pickle.loads(pickle.dumps(attack))
    (tmp_path / "mark").unlink()  # it works where pickles are loaded
    torch.save(attack, checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded as BERT"):
        load_model(continued, vocabulary.size, vocabulary.pad_id)
    assert not (tmp_path / "mark").exists()


def test_weights_in_pytorchs_format_load(continued, checkpoint, vocabulary):
    expected = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(expected, checkpoint / "pytorch_model.bin")
    model, warnings = load_model(continued, vocabulary.size, vocabulary.pad_id)
    assert not warnings
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_code_beside_a_checkpoint_is_not_run(continued, checkpoint, vocabulary, tmp_path):
    """It is loaded as the plain BERT that it says it is; what is none is refused."""
    (checkpoint / "custom.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Custom: pass\n")
    classes = {name: "custom.Custom" for name in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoTokenizer")}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(content | {"auto_map": classes}))
    load_model(continued, vocabulary.size, vocabulary.pad_id)
    load_tokenizer(continued, lambda: iter(()), "")
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(content | {"model_type": "custom"}))
    with pytest.raises(UserError, match=r"knows no type custom.* code of its own"):
        load_model(continued, vocabulary.size, vocabulary.pad_id)
    assert not (tmp_path / "mark").exists()


def test_a_run_connects_to_nothing(continued, monkeypatch):
    """Even where the libraries are allowed to."""
    asked = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda self, *arguments: asked.append(arguments))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: asked.append(arguments))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = run(continued)
    assert not asked
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
