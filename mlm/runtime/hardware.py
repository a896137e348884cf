"""The hardware: its devices, the precision it computes in, its attention kernels, its memory."""

import ctypes
import gc
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from Config import Config, DownstreamConfig
from mlm.errors import UserError

POSITIONS_THAT_FILL_A_GPU = 16_000  # in a step

DeviceSettings = Config | DownstreamConfig


def choose_devices(config: DeviceSettings) -> None:
    """Makes `cuda_visible_devices` alone visible to CUDA; to be called before anything asks CUDA for a GPU."""
    if config.cuda_visible_devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices.replace(" ", "")


def check_devices(config: DeviceSettings) -> None:
    """Raises UserError where `cuda_visible_devices` names GPUs that are not here."""
    named = len(config.cuda_visible_devices.split(",")) if config.cuda_visible_devices else 0
    if named > count_gpus():
        raise UserError(f"cuda_visible_devices: names {named} GPU(s), of which {count_gpus()} can be used here")


def stay_on_cpu() -> bool:
    """Whether ACCELERATE_USE_CPU is set."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def count_gpus() -> int:
    """Returns how many GPUs can be used."""
    import torch  # here, as it takes seconds, which a check of the settings should not

    return 0 if stay_on_cpu() else torch.cuda.device_count()


def native_precision() -> str:
    """Returns the fastest precision of this machine's GPU, or else of its CPU: bf16, fp16, or "no" for float32. Volta
    and Turing GPUs (V100, T4; compute capability 7.x) have tensor cores for fp16 and none for bf16."""
    import torch

    if not count_gpus():
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "no"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if torch.version.hip is None and torch.cuda.get_device_capability() >= (7, 0) else "no"


def choose_precision(config: DeviceSettings) -> str:
    """Returns the precision of forward passes: the setting's, else the launcher's, else the native one. Raises
    UserError for fp16 and tf32 on a CPU, and for a launcher's choice that is not known here."""
    chosen: str = config.mixed_precision
    if chosen == "auto":
        chosen = os.environ.get("ACCELERATE_MIXED_PRECISION") or native_precision()
    if chosen not in ("no", "tf32", "fp16", "bf16"):
        raise UserError(f"mixed_precision: the launcher's {chosen} is not supported; pass --mixed_precision bf16")
    if chosen in ("fp16", "tf32") and not count_gpus():
        by = "" if config.mixed_precision == chosen else ", which the launcher chose (see `accelerate config`),"
        raise UserError(f"mixed_precision: {chosen}{by} needs a GPU and none is used; on a CPU choose bf16 or no")
    return chosen


def has_variable_length_kernels(attention_dropout: float, precision: str, head_size: int) -> bool:
    """Whether attention needs neither padding nor mask: on GPUs from Ampere on, in 16 bits, without dropout inside, and
    with a torch that was built with flash attention."""
    import torch

    fits = precision != "no" and attention_dropout == 0 and head_size % 8 == 0 and head_size <= 256
    if not fits or count_gpus() == 0 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


OUT_OF_MEMORY = (
    "out of memory",  # torch.AcceleratorError where the driver refuses
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # on a CPU
)


class OutOfMemory(Exception):
    """A device has too little memory for what was asked of it."""


@contextmanager
def detect_out_of_memory() -> Iterator[None]:
    """Raises OutOfMemory where the block's memory does not suffice: not all such errors are torch.OutOfMemoryError.
    Whoever catches it is to leave the `except` before trying again: until then it holds what the block had made."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)):
            raise
        raise OutOfMemory(str(error)) from error


def release_memory() -> None:
    """Frees what a block that ran out of memory had made, and returns it to the device.

    Its error can be part of a cycle of references, which keeps the activations of the failed pass until the garbage
    collector comes by: seen with torch 2.11 on CUDA, where each attempt then had less memory than the one before.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Makes the C library keep the memory that a training step frees for the next one, instead of returning it to the
    system, which would have to fault it in again page by page. For glibc (mallopt(3)); elsewhere nothing changes.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)


def hints(processes: int, positions_per_step: int, batch_size: int, chunks: int) -> list[str]:
    """Returns hints where GPUs are unused, or have so little work that they mostly wait for the next call.

    chunks: in the text; a batch cannot be larger.
    """
    lines, positions_per_gpu = [], max(1, positions_per_step // processes)
    if processes == 1 and count_gpus() > 1:
        lines.append(f"hint: {count_gpus()} GPUs are here and one is used; ./run.sh uses them all")
    if count_gpus() and positions_per_gpu < POSITIONS_THAT_FILL_A_GPU and batch_size < chunks:
        enough = min(chunks, math.ceil(batch_size * POSITIONS_THAT_FILL_A_GPU / positions_per_gpu))
        lines.append(
            f"hint: a step of about {positions_per_gpu:,} positions leaves a GPU idle between its calls; --batch_size "
            f"{enough} would fill it (and may want a higher learning_rate)"
        )
    return lines
