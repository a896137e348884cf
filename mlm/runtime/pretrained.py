"""What a folder or a name on the Hub holds: an encoder's config and weights, refused where not what they seem."""

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import CONFIG_MAPPING, BertConfig, PreTrainedConfig, PreTrainedModel

from mlm.errors import UserError, first_line
from mlm.runtime.hub import locate

HEADS = re.compile(r"(cls|lm_head|classifier|(\w+\.)?pooler)\.")  # names of weights that tell nothing of an encoder
NUMBERS = (".position_ids", ".token_type_ids")  # that early releases saved with the embeddings
REMEDIES = {  # where an encoder's weights have other names than BERT's
    r"module\.": "they were saved from DataParallel; save those of model.module",
    r"embedding\.|encoder\.transformer\.": "they are UER-py's; its convert_bert_from_uer_to_huggingface.py helps",
}
OWN_CODE = "Its config.json names code of its own (auto_map), which is not run here"
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


def load_encoder_config(name: str, setting: str) -> PreTrainedConfig:
    """Loads a checkpoint's config. Raises UserError, which names the setting, where transformers knows no such type.

    Where it does not say of which type it is, as early ones, it is taken as BERT's: other weights have other names.
    """

    def load(name: str, **options: Any) -> PreTrainedConfig:
        content, _ = BertConfig.get_config_dict(name, **options)
        if not content:
            raise ValueError("it has no config.json")
        family = content.get("model_type") or "bert"
        if family not in CONFIG_MAPPING:
            own_code = f". {OWN_CODE}" if "auto_map" in content else ""
            raise ValueError(f"transformers {version('transformers')} knows no type {family}{own_code}")
        return CONFIG_MAPPING[family].from_dict(content)

    return load_pretrained(load, name, setting, "an encoder")


def family_name(config: Any) -> str:
    """Returns what a config's family is called in a sentence."""
    return "BERT" if config.model_type == "bert" else str(config.model_type)


def load_weights(kind: Any, name: str, setting: str, **options: Any) -> tuple[Any, list[str], list[str]]:
    """Loads a model of one of transformers' classes in float32, whatever it was saved in.

    Returns the model; the names of its weights that are new, as the file lacks them or has them in another shape, which
    are those of a head or the pooler; and warnings about weights of the encoder that are in the file and not used.
    Raises UserError where any other weight is missing or of another shape, or one is not finite.
    """
    family = family_name(kind.config_class)
    options |= {"dtype": torch.float32, "attn_implementation": "sdpa", "output_loading_info": True}
    model, loading = load_pretrained(
        kind.from_pretrained, name, setting, family, ignore_mismatched_sizes=True, **options
    )
    shapes = {key: (tuple(in_file), tuple(in_model)) for key, in_file, in_model in sorted(loading["mismatched_keys"])}
    for key, (in_file, in_model) in shapes.items():
        if not _may_be_new(key, model):
            raise UserError(
                f"{setting}: {key} of {name} has the shape {in_file} in its file and {in_model} by its config.json; "
                "the two do not belong together"
            )
    unused = sorted(loading["unexpected_keys"])
    missing = sorted({*loading["missing_keys"], *shapes})
    lacking = [key for key in missing if not _may_be_new(key, model)]
    if lacking:
        raise UserError(
            f"{setting}: {name} lacks {len(lacking):,} of {family}'s weights, such as {lacking[0]}"
            f"{_what_it_has(unused, model)}"
        )
    for key, parameter in model.named_parameters():
        if not parameter.sum().isfinite():
            raise UserError(f"{setting}: {name} has weights that are not finite, in {key}")
        # Copied out of the file that it is a view of: matrix products round by the alignment of their inputs, which is
        # arbitrary in the file, so that a resumed run would drift from the uninterrupted one.
        parameter.data = parameter.data.clone()
    unplaced = [key for key in unused if _is_of_encoder(key, model)]
    warning = (
        f"warning: {len(unplaced):,} weights of {name} are not used, as its config.json has no place for them, such "
        f"as {(unplaced or [''])[0]}"
    )
    return model, missing, [warning] if unplaced else []


def _may_be_new(key: str, model: PreTrainedModel) -> bool:
    """Whether a weight of the model may be drawn anew, as a task does with its head and the pooler."""
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    return not key.startswith(encoder) or key.removeprefix(encoder).startswith("pooler")


def _is_of_encoder(key: str, model: PreTrainedModel) -> bool:
    """Whether a weight in a file is of the encoder itself, by its name: no head's, nor of a pooler that it lacks."""
    part = key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return part in dict(model.base_model.named_children()) and not key.endswith(NUMBERS)


def _what_it_has(unused: list[str], model: PreTrainedModel) -> str:
    """Returns the end of a sentence on weights that are missing: which are there instead, and what may help."""
    if hasattr(model.config, "auto_map"):
        return f". {OWN_CODE}"
    others = [key for key in unused if not HEADS.match(key)]
    if not others:
        return ""
    remedy = next((f": {text}" for names, text in REMEDIES.items() if re.match(names, others[0])), "")
    return f". It has others, such as {others[0]}{remedy}"
