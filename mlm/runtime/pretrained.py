"""What a folder or a name on the Hub holds: a BERT's config and weights, refused where they are not what they seem."""

import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import BertConfig

from mlm.errors import UserError, first_line
from mlm.runtime.hub import locate

NEW_IF_MISSING = re.compile(r"(cls|classifier|(bert\.)?pooler)\.")  # names of weights that a task draws anew
OF_THE_ENCODER = re.compile(r"(bert\.)?(embeddings|encoder)\.(?!(position|token_type)_ids$)")
REMEDIES = {  # where an encoder's weights have other names than BERT's
    r"module\.": "they were saved from DataParallel; save those of model.module",
    r"embedding\.|encoder\.transformer\.": "they are UER-py's; its convert_bert_from_uer_to_huggingface.py helps",
}
LFS_POINTER = b"version https://git-lfs"


def load_pretrained(load: Callable[..., Any], name: str, setting: str, what: str, **options: Any) -> Any:
    """Calls a class's `from_pretrained`, or what works as it does, without code from the checkpoint.

    Raises UserError, which names the setting and `what` was to be loaded, where that fails.
    """
    is_local = locate(name, setting) != "hub"
    try:
        return load(name, local_files_only=is_local, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises whatever the file at fault made it raise
        raise UserError(f"{setting}: {name} cannot be loaded as {what}: {_cause(Path(name), error)}") from error


def _cause(folder: Path, error: Exception) -> str:
    """Returns why a checkpoint cannot be loaded, in words that help more than the library's where its files tell."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{path.name} is a pointer of Git LFS, not the weights; run `git lfs pull` in that folder"
    if (folder / "bert_config.json").exists() and not (folder / "config.json").exists():
        return "it is a TensorFlow checkpoint (bert_config.json); take the same model from the Hub, or convert it"
    if isinstance(error, UnpicklingError):
        return "its file holds more than weights, or is damaged"
    return first_line(error) or type(error).__name__


def stored_file(name: str, file: str) -> Path | None:
    """Returns where a file of a checkpoint lies: in its folder, or in the cache of what was loaded from the Hub."""
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    cached = try_to_load_from_cache(name, file)
    return Path(cached) if isinstance(cached, str) else None


def load_bert_config(name: str, setting: str) -> BertConfig:
    """Loads a checkpoint's config. Raises UserError, which names the setting, where it is not a BERT encoder's.

    Where it does not say of which type it is, as early ones, it is taken as BERT's: other weights have other names.
    """

    def load(name: str, **options: Any) -> tuple[str, BertConfig]:
        content, _ = BertConfig.get_config_dict(name, **options)
        if not content:
            raise ValueError("it has no config.json")
        return content.get("model_type") or "bert", BertConfig.from_dict(content)

    model_type, config = load_pretrained(load, name, setting, "BERT")
    if model_type != "bert" or config.is_decoder:
        raise UserError(
            f"{setting}: {name} is not a BERT encoder but "
            f"{'a decoder' if model_type == 'bert' else f'of type {model_type}'}"
        )
    return config


def load_weights(kind: Any, name: str, setting: str, **options: Any) -> tuple[Any, list[str], list[str]]:
    """Loads a BERT of a class in float32, whatever it was saved in.

    Returns the model; the names of its weights that are new, as the file lacks them or has them in another shape, which
    are those of a head or the pooler; and warnings about weights of the encoder that are in the file and not used.
    Raises UserError where any other weight is missing or of another shape, or one is not finite.
    """
    options |= {"dtype": torch.float32, "attn_implementation": "sdpa", "output_loading_info": True}
    model, loading = load_pretrained(
        kind.from_pretrained, name, setting, "BERT", ignore_mismatched_sizes=True, **options
    )
    shapes = {key: (tuple(in_file), tuple(in_model)) for key, in_file, in_model in sorted(loading["mismatched_keys"])}
    for key, (in_file, in_model) in shapes.items():
        if not NEW_IF_MISSING.match(key):
            raise UserError(
                f"{setting}: {key} of {name} has the shape {in_file} in its file and {in_model} by its config.json; "
                "the two do not belong together"
            )
    unused = sorted(loading["unexpected_keys"])
    missing = sorted({*loading["missing_keys"], *shapes})
    lacking = [key for key in missing if not NEW_IF_MISSING.match(key)]
    if lacking:
        raise UserError(
            f"{setting}: {name} lacks {len(lacking):,} of BERT's weights, such as {lacking[0]}"
            f"{_what_it_has(unused, model.config)}"
        )
    for key, parameter in model.named_parameters():
        if not parameter.sum().isfinite():
            raise UserError(f"{setting}: {name} has weights that are not finite, in {key}")
        # Copied out of the file that it is a view of: matrix products round by the alignment of their inputs, which is
        # arbitrary in the file, so that a resumed run would drift from the uninterrupted one.
        parameter.data = parameter.data.clone()
    unplaced = [key for key in unused if OF_THE_ENCODER.match(key)]
    warning = (
        f"warning: {len(unplaced):,} weights of {name} are not used, as its config.json has no place for them, such "
        f"as {(unplaced or [''])[0]}"
    )
    return model, missing, [warning] if unplaced else []


def _what_it_has(unused: list[str], config: BertConfig) -> str:
    """Returns the end of a sentence on weights that are missing: which are there instead, and what may help."""
    if hasattr(config, "auto_map"):
        return ". Its config.json names code of its own (auto_map), which is not run here"
    others = [key for key in unused if not NEW_IF_MISSING.match(key)]
    if not others:
        return ""
    remedy = next((f": {text}" for names, text in REMEDIES.items() if re.match(names, others[0])), "")
    return f". It has others, such as {others[0]}{remedy}"
