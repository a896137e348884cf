"""Which devices and precision a run uses, and its hints where they are wasted; GPUs are simulated."""

import pytest
import torch

from Config import Config
from mlm.errors import UserError
from mlm.runtime import hardware


@pytest.mark.parametrize(
    ("setting", "launcher", "native", "chosen"),
    [
        ("auto", None, "bf16", "bf16"),
        ("auto", None, "no", "no"),
        ("auto", "no", "bf16", "no"),  # what the launcher says is obeyed
        ("auto", "bf16", "no", "bf16"),
        ("no", "bf16", "bf16", "no"),  # and the setting before it
        ("tf32", "bf16", "bf16", "tf32"),
    ],
)
def test_precision_is_the_settings_else_the_launchers_else_the_native(monkeypatch, setting, launcher, native, chosen):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(hardware, "native_precision", lambda: native)
    monkeypatch.setattr(hardware, "count_gpus", lambda: 1)
    assert hardware.choose_precision(Config(mixed_precision=setting)) == chosen


@pytest.mark.parametrize(
    ("launcher", "said"), [("fp16", "fp16, which the launcher chose .* needs a GPU"), ("fp8", "fp8 is not supported")]
)
def test_a_launchers_choice_that_cannot_be_is_said(monkeypatch, launcher, said):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    with pytest.raises(UserError, match=said):
        hardware.choose_precision(Config())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(set(), "no"), ({"_is_avx512_bf16_supported"}, "bf16"), ({"_is_amx_tile_supported"}, "bf16")],
)
def test_a_cpu_computes_bf16_with_avx512_bf16_or_amx(monkeypatch, flags, expected):
    for flag in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, flag, lambda flag=flag: flag in flags)
    assert hardware.native_precision() == expected


@pytest.mark.parametrize(
    ("gpus", "processes", "positions_per_step", "hints"),
    [
        (0, 1, 10, []),
        (1, 1, 16_000, []),
        (1, 1, 800, ["about 800 positions leaves a GPU idle between its calls; --batch_size 500 would"]),
        (4, 1, 100_000, ["4 GPUs are here and one is used; ./run.sh"]),
        (8, 8, 6, ["about 1 positions"]),
        (4, 4, 32_000, ["about 8,000 positions leaves a GPU idle between its calls; --batch_size 64 would"]),
    ],
)
def test_hints_where_the_machine_is_wasted(monkeypatch, gpus, processes, positions_per_step, hints):
    monkeypatch.setattr(hardware, "count_gpus", lambda: gpus)
    found = hardware.hints(processes, positions_per_step, batch_size=32, chunks=500)
    assert len(found) == len(hints) and all(hint in line for hint, line in zip(hints, found, strict=True))


def test_gpus_that_are_not_here_are_said(monkeypatch):
    monkeypatch.setattr(hardware, "count_gpus", lambda: 2)
    hardware.check_devices(Config(cuda_visible_devices="0,1"))
    with pytest.raises(UserError, match=r"cuda_visible_devices: names 3 GPU\(s\), of which 2"):
        hardware.check_devices(Config(cuda_visible_devices="0,1,7"))
