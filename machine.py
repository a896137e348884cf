"""What the hardware can do and how to use all of it: number formats, micro-batches, processes to launch."""

import os
from pathlib import Path

from Config import Config, UserError, parse_flags, plain_errors


def choose_devices(config: Config) -> None:
    """Lets CUDA see `cuda_visible_devices` alone; to be called before anything asks CUDA for a GPU."""
    if config.cuda_visible_devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices.replace(" ", "")


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")


def native_precision() -> str:
    """bf16 where this machine's GPU or CPU computes in it, else "no"."""
    import torch

    if on_gpu():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"


def choose_precision(config: Config) -> str:
    """The number format of the forward pass: the setting, else the launcher's choice, else what is native here.

    Raises UserError for fp16 on a CPU, and for a launcher's choice that is not known here.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    chosen, source = config.mixed_precision, "mixed_precision"
    if chosen == "auto":
        chosen, source = launched or native_precision(), "the launcher's mixed_precision"
    if chosen not in ("no", "fp16", "bf16"):
        raise UserError(f"{source}: {chosen} is not supported; run `accelerate config` again, or pass --mixed_precision bf16")
    if chosen == "fp16" and not on_gpu():
        raise UserError(f"{source}: fp16 needs a GPU, and none is used here; on a CPU choose bf16, no or auto")
    return chosen


def default_micro_batch_tokens() -> int:
    """Tokens in a forward pass where the setting is unset. BERT-base with 8,192 fits a GPU of 8 GB."""
    return 8192 if on_gpu() else 2048


def hints(processes: int, tokens_per_step: float) -> list[str]:
    """Plain words where the machine is wasted."""
    import torch

    gpus, found = torch.cuda.device_count() if on_gpu() else 0, []
    if gpus > 1 and processes == 1:
        found.append(f"hint: {gpus} GPUs are here and one is used; ./run.sh uses them all")
    if gpus and tokens_per_step / processes < 2048:
        found.append(
            f"hint: a step has about {tokens_per_step / processes:,.0f} tokens a GPU, too few to keep it busy; "
            "a larger batch_size (and learning_rate) trains faster"
        )
    return found


def launch_arguments(config: Config) -> list[str]:
    """What run.sh hands to `accelerate launch`: the user's accelerate configuration, or every visible GPU without one."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    choose_devices(config)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "") if config.cuda_visible_devices else ""
    gpus = len(devices.split(",")) if devices else torch.cuda.device_count()
    arguments = ["--gpu_ids", devices] if devices else []
    if Path(default_config_file).is_file():
        return arguments + (["--num_processes", str(gpus)] if devices else [])
    if not torch.cuda.is_available():
        arguments.append("--cpu")
    if gpus > 1:
        arguments.append("--multi_gpu")
    machine = {"num_processes": max(gpus, 1), "num_machines": 1, "mixed_precision": native_precision(), "dynamo_backend": "no"}
    return arguments + [part for name, value in machine.items() for part in (f"--{name}", str(value))]


if __name__ == "__main__":
    with plain_errors():
        print(*launch_arguments(parse_flags()))
