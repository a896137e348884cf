"""The optimizers' steps, beside torch's own; which parameters are whose; and what a new head begins with."""

import numpy as np
import pytest
import torch
from texts import make_lines
from transformers import BertConfig, BertForMaskedLM, BertModel

from mlm.data.chunks import count_tokens
from mlm.training.optimizer import make_optimizer, orthogonalize
from model import load_model

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=50, **SHAPE))


def draw_gradients(model, step):
    draw = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (32, 128), (128, 32), (1, 7)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_lengths(rows, columns):
    matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(rows))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalize(matrices, torch.float32) @ v.mT  # diagonal: the new singular values
    lengths = torch.diagonal(rotated, dim1=1, dim2=2)
    assert (rotated - torch.diag_embed(lengths)).abs().max() < 1e-3
    assert lengths.quantile(0.05) > 0.6 and lengths.max() < 1.3  # the smallest of all may need more iterations


def test_muons_steps_are_those_of_torch(bert):
    """torch's iterates one matrix after the other, in bfloat16 alone."""
    ours, theirs = bert, BertForMaskedLM(bert.config)
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, "muon", 0.02, 0.1, "bf16")
    matrices = {name: weight for name, weight in theirs.named_parameters() if ".dense.weight" in name or "self" in name}
    matrices = {name: weight for name, weight in matrices.items() if weight.ndim == 2}
    reference = torch.optim.Muon(matrices.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    begun = {name: weight.detach().clone() for name, weight in matrices.items()}
    for step in range(5):
        draw_gradients(ours, step)
        draw_gradients(theirs, step)
        optimizer.step()
        reference.step()
    assert len(matrices) == 2 * 6 + 1  # of two layers and of the head
    for name, weight in matrices.items():
        moved = (weight - begun[name]).norm()
        assert (ours.get_parameter(name) - weight).norm() < 0.02 * moved


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_all_else_is_adamws(bert, name):
    ours, theirs = bert, BertForMaskedLM(bert.config)
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, name, 0.01, 0.1)
    decays = [weight for weight in theirs.parameters() if weight.ndim > 1]
    rest = [weight for weight in theirs.parameters() if weight.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, eps=1e-6, fused=True)
    for step in range(3):
        draw_gradients(ours, step)
        draw_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for key, weight in theirs.named_parameters():
        is_muons = name == "muon" and weight.ndim == 2 and "embeddings" not in key
        assert torch.equal(ours.get_parameter(key), weight) != is_muons, key
        kinds = {"momentum"} if is_muons else {"step", "exp_avg", "exp_avg_sq"}
        assert {*optimizer.state[ours.get_parameter(key)]} == kinds


def test_tokens_are_counted(settings, tokenizer, vocabulary):
    from data_process import prepare
    from mlm.text.files import find_text

    config = settings()
    train, _, _ = prepare(config, find_text(config), tokenizer, vocabulary)
    ids = [i for line in make_lines(120, seed=1) for i in tokenizer(line, add_special_tokens=False)["input_ids"]]
    assert np.array_equal(count_tokens(train, vocabulary.size), np.bincount(ids, minlength=vocabulary.size))


@pytest.mark.parametrize("start", ["scratch", "without a head", "with a head", "a checkpoint"])
def test_a_new_head_begins_with_the_tokens_frequencies(tmp_path, settings, vocabulary, start):
    """So that a model of random weights guesses by them: its loss is about that of the unigram distribution."""
    counts = np.arange(vocabulary.size) ** 2
    kind = BertModel if start == "without a head" else BertForMaskedLM
    kind(BertConfig(vocab_size=vocabulary.size + 3, **SHAPE)).save_pretrained(tmp_path / "start")
    name = "scratch:tiny" if start == "scratch" else str(tmp_path / "start")
    config = settings(initial_pretrain_model=name, initial_pretrain_tokenizer="corpus" if start == "scratch" else name)
    resumed = tmp_path / "start" if start == "a checkpoint" else None
    model, _ = load_model(config, vocabulary.size, vocabulary.pad_id, resumed, count_tokens=lambda: counts)
    bias = model.cls.predictions.bias.detach()
    if start in ("with a head", "a checkpoint"):
        assert not bias.any()
        return
    shares = torch.ones(len(bias), dtype=torch.float64)
    shares[: len(counts)] += torch.tensor(counts)
    torch.testing.assert_close(bias, (shares / shares.sum()).log().float())
    logits = model.eval()(torch.tensor([[2, 10, 20, 3]])).logits[0]
    torch.testing.assert_close(logits.log_softmax(-1), bias.expand(4, -1), atol=1.0, rtol=0)
