"""What users of GPUs rely on, as far as a CPU can show it: the memory trial, memory that runs out, kernels, formats."""

import json
import os
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from runs import assert_close, finish, fork_program, fork_ranks, learner_of, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from Config import Config
from mlm.encoder.packed import PackedMaskedLM
from mlm.errors import UserError
from mlm.runtime import hardware
from mlm.training import checkpoint, micro_batch_size
from mlm.training import step as training_step
from mlm.training.micro_batch_size import fit_memory
from mlm.training.run import Learner
from model import load_model


@pytest.fixture
def trial(settings, vocabulary, monkeypatch):
    """Runs the memory trial and records each of its forward passes: positions, masked tokens, whether gradients are
    held already."""

    def make(largest_that_fits: int = 10**9, **changes) -> tuple[int, list[tuple[int, int, bool]], torch.nn.Module]:
        config = settings(**changes)
        learner = learner_of(load_model(config, vocabulary.size, vocabulary.pad_id)[0], vocabulary)
        forward, passes = PackedMaskedLM.forward, []

        def watched(self, **inputs):
            positions = inputs["input_ids"].numel()
            held = all(p.grad is not None for p in learner.model.parameters() if p.requires_grad)
            passes.append((positions, len(inputs["label_positions"]), held))
            if positions > largest_that_fits:
                raise torch.OutOfMemoryError("no memory")
            return forward(self, **inputs)

        monkeypatch.setattr(PackedMaskedLM, "forward", watched)
        return fit_memory(learner, config), passes, learner.model

    return make


@pytest.mark.parametrize(("probability", "share"), [(0.15, 0.25), (0.3, 0.45), (0.9, 1.0)])
def test_the_memory_trial_masks_more_than_chance_will(trial, probability, share):
    _, passes, _ = trial(mlm_probability=probability)
    positions, masked, _ = passes[-1]
    assert 16 * 32 <= positions < 1.2 * 16 * 32  # in one micro-batch, padding included
    assert masked == pytest.approx(share * 16 * 30, abs=1)


def test_the_memory_trial_loads_kernels_with_one_chunk_and_then_holds_full_gradients(trial):
    positions, passes, model = trial(largest_that_fits=200)
    assert positions == 128
    assert [(size, held) for size, _, held in passes] == [(32, False), (576, True), (256, True), (128, True)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_memory_trial_halves_where_a_backward_pass_runs_out_on_several_ranks(trial, monkeypatch):
    """Its model is not shared, so no other rank waits in that pass: it is one more size that does not fit."""
    backward, passes = Accelerator.backward, []

    def limited(self, loss, **options):
        passes.append(loss)
        if len(passes) == 2:  # the first loads kernels, by one chunk
            raise torch.OutOfMemoryError("no memory")
        backward(self, loss, **options)

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "backward", limited)
    assert trial()[0] == 4 * 32  # of a rank's 8 chunks


def test_logits_are_freed_before_the_backward_pass(settings, monkeypatch):
    forward, backward, made = PackedMaskedLM.forward, Accelerator.backward, []

    def watched(self, **inputs):
        logits = forward(self, **inputs)
        made.append(weakref.ref(logits))
        return logits

    def checked(self, loss, **options):
        assert made and not any(logits() is not None for logits in made)
        backward(self, loss, **options)

    monkeypatch.setattr(PackedMaskedLM, "forward", watched)
    monkeypatch.setattr(Accelerator, "backward", checked)
    run(settings(max_steps=2, micro_batch_tokens=128))


def test_the_memory_trial_leaves_some_memory_to_others(monkeypatch):
    gpu = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert 4 * 10**9 <= micro_batch_size._spare_bytes(torch.device("cuda", 0)) <= 8 * 10**9
    assert micro_batch_size._spare_bytes(torch.device("cpu")) == 0


class MadeTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that were made under it and are still held."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.made += [weakref.ref(each) for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        return result

    def held_bytes(self) -> int:
        tensors = [tensor for made in self.made if (tensor := made()) is not None]
        return sum(
            {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values()
        )


def test_the_memory_trial_holds_what_training_will_hold_and_some_spare(trial, monkeypatch):
    monkeypatch.setattr(micro_batch_size, "_spare_bytes", lambda device: 10**6)
    forward, held = PackedMaskedLM.forward, []

    def counting(self, **inputs):
        held.append(made.held_bytes())
        return forward(self, **inputs)

    monkeypatch.setattr(PackedMaskedLM, "forward", counting)
    with MadeTensors() as made:
        _, _, model = trial()
    before, during = held
    moments = 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert during - before >= moments + 10**6


def test_what_the_memory_trial_compiled_on_several_ranks_is_dropped(trial, monkeypatch):
    dropped = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: dropped.append(True))
    trial(compile=True)
    assert not dropped
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    trial()
    assert not dropped
    trial(compile=True)
    assert dropped


def test_a_resumed_run_takes_the_size_that_was_found_and_tries_nothing(monkeypatch):
    monkeypatch.setattr(
        micro_batch_size, "is_found_by_trial", lambda accelerator, config: config.micro_batch_tokens is None
    )
    monkeypatch.setattr(micro_batch_size, "fit_memory", lambda *arguments: 4096)
    learner = Learner(Accelerator(), None, None, None, None)
    assert micro_batch_size.choose(learner, Config(), found=None) == 4096
    monkeypatch.setattr(micro_batch_size, "fit_memory", lambda *arguments: pytest.fail("another trial"))
    assert micro_batch_size.choose(learner, Config(), found=2048) == 2048
    assert (
        micro_batch_size.choose(learner, Config(micro_batch_tokens=512), found=2048) == 512
    )  # what the user says comes first


def test_a_checkpoint_holds_the_size_that_was_found_or_halved_since(settings, monkeypatch):
    def halving(learner, progress, *others):
        if progress.step == 2:
            learner.micro_batcher.halve()
        return take_step(learner, progress, *others)

    take_step = training_step.take_step
    monkeypatch.setattr(micro_batch_size, "fit_memory", lambda *arguments: 128)
    for module in (micro_batch_size, checkpoint):  # as on a GPU
        monkeypatch.setattr(module, "is_found_by_trial", lambda accelerator, config: True)
    monkeypatch.setattr(training_step, "take_step", halving)
    folder = run(settings(max_steps=5, save_every=2))
    sizes = [
        json.loads((folder / "checkpoints" / f"step-0000000{step}" / "state.json").read_text())["progress"]
        for step in (2, 4)
    ]
    assert [size["micro_batch_tokens"] for size in sizes] == [128, 64]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_memory_that_runs_out_is_known_in_all_its_shapes(settings, monkeypatch, capsys, error):
    """In a training step and in an evaluation: both are repeated in smaller micro-batches."""
    forward, failures = PackedMaskedLM.forward, []

    def limited(self, input_ids, *arguments, **more):
        if input_ids.numel() > 96:
            failures.append(self.training)
            raise error
        return forward(self, input_ids, *arguments, **more)

    monkeypatch.setattr(PackedMaskedLM, "forward", limited)
    run(settings(max_steps=2, micro_batch_tokens=256))
    assert failures == [False, False]  # found out by the evaluation of the start, and kept
    failures.clear()
    monkeypatch.setattr("mlm.training.plan.Plan.is_evaluation_due", lambda plan, step: step == 2)
    monkeypatch.setattr("train.finish", lambda *arguments: None)
    run(settings(max_steps=2, micro_batch_tokens=256))
    assert failures == [True, True]
    assert "step 1: out of memory; this and all later steps use micro-batches of 64" in capsys.readouterr().out


def test_other_errors_are_not_taken_for_memory_that_ran_out():
    for text in (
        "CUDA error: device-side assert triggered",
        "expected scalar type Float",
        "CUBLAS_STATUS_EXECUTION_FAILED",
    ):
        with pytest.raises(RuntimeError, match=text), hardware.detect_out_of_memory():
            raise RuntimeError(text)


def limit_memory_of_the_second():
    """Has this rank run out of memory if it is the second, and else say what it does."""
    forward, rank = PackedMaskedLM.forward, os.environ["RANK"]

    def limited(self, input_ids, *arguments, **more):
        if rank == "1" and input_ids.numel() > (96 if self.training else 150):
            raise torch.OutOfMemoryError("no memory")
        if self.training and rank == "0":
            backend = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
            print("patience", backend.options._timeout)
            print("positions", input_ids.numel())
        return forward(self, input_ids, *arguments, **more)

    PackedMaskedLM.forward = limited


@pytest.mark.slow
def test_two_ranks_agree_to_use_smaller_micro_batches_and_wait_minutes_for_each_other(settings):
    """One of them alone runs out of memory, in an evaluation and in a step."""
    usual = {"max_steps": 10, "hidden_dropout": 0.0, "log_every": 1, "micro_batch_tokens": 256}
    before = {0: limit_memory_of_the_second, 1: limit_memory_of_the_second}
    first, second = fork_ranks(settings(run_name="limited", **usual), 2, before)
    undisturbed = run(settings(run_name="undisturbed", **usual))
    out, _ = finish(first)
    finish(second)
    assert re.findall(r"step \d: out of memory; .* micro-batches of (\d+)", out) == ["64"]
    sizes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("positions")]
    assert 64 < max(sizes) <= 128 and max(sizes[-10:]) <= 64  # the rank that has memory divides as finely
    assert "patience 0:15:00" in out
    assert_close(undisturbed.with_name("limited"), undisturbed)


def pretend_gpu(monkeypatch, capability: tuple[int, int], bf16: bool = True, flash: bool = True) -> None:
    monkeypatch.setattr(hardware, "count_gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)


@pytest.mark.parametrize(
    ("capability", "bf16", "expected"),
    [((9, 0), True, "bf16"), ((7, 5), False, "fp16"), ((7, 0), False, "fp16"), ((6, 1), False, "no")],
)
def test_a_gpu_computes_in_the_fastest_format_it_has(monkeypatch, capability, bf16, expected):
    pretend_gpu(monkeypatch, capability, bf16)
    assert hardware.native_precision() == expected


@pytest.mark.parametrize(
    ("capability", "flash", "expected"), [((8, 0), True, True), ((8, 0), False, False), ((7, 5), True, False)]
)
def test_variable_length_kernels_need_the_card_and_a_torch_that_has_them(monkeypatch, capability, flash, expected):
    pretend_gpu(monkeypatch, capability, flash=flash)
    assert hardware.has_variable_length_kernels(0.0, "bf16", head_size=64) is expected
    assert not hardware.has_variable_length_kernels(0.0, "no", head_size=64)
    assert not hardware.has_variable_length_kernels(0.1, "bf16", head_size=64)


def test_query_key_and_value_share_one_copy_of_their_input_in_16_bits(settings, vocabulary):
    model = PackedMaskedLM(load_model(settings(), vocabulary.size, vocabulary.pad_id)[0])
    attention, inputs = model.model.bert.encoder.layer[0].attention.self, []
    for projection in (attention.query, attention.key, attention.value):
        projection.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    ids = torch.full((1, 8), vocabulary.unk_id)
    packed = {
        "position_ids": torch.arange(8)[None],
        "label_positions": torch.tensor([3]),
        "segment_ids": torch.ones_like(ids),
    }
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, **packed)
    assert {tensor.dtype for tensor in inputs} == {torch.bfloat16} and len({id(tensor) for tensor in inputs}) == 1
    inputs.clear()
    model(ids, **packed)
    assert {tensor.dtype for tensor in inputs} == {torch.float32}


def test_gradients_are_views_of_what_the_ranks_exchange(settings, monkeypatch):
    handlers = {}

    class Watched(Accelerator):
        def __init__(self, kwargs_handlers, **options):
            handlers.update({type(handler).__name__: handler for handler in kwargs_handlers})
            super().__init__(kwargs_handlers=kwargs_handlers, **options)

    monkeypatch.setattr("mlm.runtime.distributed.Accelerator", Watched)
    run(settings(max_steps=1))
    assert handlers["DistributedDataParallelKwargs"].gradient_as_bucket_view


def test_tf32_rounds_the_inputs_of_products_and_is_another_format_to_resume_in(settings, monkeypatch):
    with pytest.raises(UserError, match="mixed_precision: tf32 needs a GPU"):
        run(settings(mixed_precision="tf32"))
    monkeypatch.setattr(hardware, "choose_precision", lambda config: config.mixed_precision)
    monkeypatch.setattr("mlm.runtime.distributed.choose_precision", hardware.choose_precision)
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    folder = run(settings(mixed_precision="tf32", max_steps=1))
    assert json.loads((folder / "settings.json").read_text())["settings"]["mixed_precision"] == "tf32"
    run(settings(mixed_precision="no", max_steps=1))
    assert chosen == ["high", "highest"]


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_to_its_end_on_a_cpu_and_says_what_it_leaves_out():
    out, _ = finish(fork_program("benchmarks/gpu.py", "--quick"))
    rows = dict(line.strip("| ").split(" | ", 1) for line in out.splitlines() if line.startswith("| "))
    for family in ("bert", "roberta", "modernbert"):
        assert "loss off by" in rows[f"{family}: packed rows against the stock model, bf16"]
    assert rows["memory trial, and memory that runs out"] == "left out: no GPU"
    assert rows["stopped and resumed"] == "the same bits"
    assert out.count("| 25 | ") == 2  # Trainer's speed and ours
