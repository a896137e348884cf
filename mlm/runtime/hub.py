"""The Hugging Face Hub: where models and data sets are to be had by name, and the upload of a model."""

import os
import threading
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from Config import Config
from mlm.errors import UserError, first_line

WIKITEXT = {"name": "Salesforce/wikitext", "setting": "path_datasets", "file": "README.md", "repo_type": "dataset"}
PROBE_SECONDS = 5  # a Hub that has not replied by then is out of reach
WAYS_OUT = """\
  a mirror         HF_ENDPOINT=https://your.mirror python train.py
  local folders    --initial_pretrain_model FOLDER --initial_pretrain_tokenizer FOLDER
  from scratch     --initial_pretrain_model scratch:mini --initial_pretrain_tokenizer corpus
  a look at it     python train.py --demo"""

# The Hub is asked for files and nothing else: no telemetry, no count of what `datasets` loads, and no request that it
# convert a model's weights from PyTorch's format to safetensors.
constants.HF_HUB_DISABLE_TELEMETRY = True
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")


@cache
def locate(
    name: str, setting: str, file: str = "config.json", repo_type: str = "model"
) -> Literal["folder", "cache", "hub"]:
    """Returns where `name` is to be loaded from; the local cache serves where the Hub is out of reach.

    What is not on the Hub is to be loaded with `local_files_only`: the libraries would retry for half a minute per file
    before they look into the cache. This asks the Hub once, for `file`.
    Raises UserError, which names `setting`, where `name` is no folder and neither the Hub nor the cache has it.
    """
    if Path(name).is_dir():
        if not Path(name, file).exists() and Path(name, "final", file).exists():
            raise UserError(f"{setting}: {name} is the folder of a run; its model is {name.rstrip('/')}/final")
        return "folder"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{setting}: there is no folder {name}")
    try:
        cached = isinstance(try_to_load_from_cache(name, file, repo_type=repo_type), str)
    except HFValidationError as error:
        raise UserError(f"{setting}: {name!r} is no folder, and no name the Hugging Face Hub could have") from error
    hub = constants.ENDPOINT
    problem = _ask_hub(hf_hub_url(name, file, repo_type=repo_type))
    if problem is None:
        return "hub"
    if cached:
        return "cache"
    if isinstance(problem, GatedRepoError):
        raise UserError(f"{setting}: {name} is gated: accept its terms at {hub}/{name}, then run `hf auth login`")
    if isinstance(problem, RepositoryNotFoundError | EntryNotFoundError):
        raise UserError(
            f"{setting}: there is no folder {name}, and {hub} has no {repo_type} of that name with a {file}; check the "
            "spelling, or run `hf auth login` if it is private"
        )
    unreachable = f"{setting}: {name} is no folder and not in the local cache, and the Hub ({hub}) cannot be reached."
    if setting == WIKITEXT["setting"]:
        raise UserError(f"{unreachable} Put text of your own into data/train.txt, or look at --demo")
    if setting == "models":
        raise UserError(f"{unreachable} Name a local folder, or a mirror by HF_ENDPOINT=https://your.mirror")
    raise UserError(f"{unreachable} Ways out:\n{WAYS_OUT}")


def is_aside(name: str) -> bool:
    """Whether a file of that name, in the text's folder, is hidden or a README: nobody means it as text."""
    return name.startswith(".") or name.upper().startswith("README")


def wants_wikitext(config: Config) -> bool:
    """Whether there is nothing at all in the folder that a user fills unless told otherwise."""
    is_default = config.path_datasets == "data" and not config.demo
    return is_default and all(is_aside(path.name) for path in Path("data").glob("*"))


def locate_downloads(config: Config) -> None:
    """Raises UserError, before any work, where something that is to be loaded by name is missing."""
    for setting in ("initial_pretrain_model", "initial_pretrain_tokenizer"):
        name = getattr(config, setting)
        if name != "corpus" and not name.startswith("scratch:"):
            locate(name, setting)
    if config.push_to_hub:
        check_push(config.push_to_hub)
    if wants_wikitext(config):
        try:
            locate(**WIKITEXT)
        except UserError as error:
            what = "path_datasets: data/ holds no text, so WikiText-2 would be fetched"
            raise UserError(f"{what}\n{error}") from error


def check_push(name: str) -> None:
    """Raises UserError where `push_to_hub` cannot work: no name that the Hub could have, or nobody logged in."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push_to_hub: {name!r} is no name the Hugging Face Hub could have; say you/bert") from error
    if not get_token():
        raise UserError("push_to_hub: nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Uploads a model's folder, privately if it is new to the Hub. Returns a message: the address, or what failed."""
    try:
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # every way a network can fail, and the Hub's own refusals
        reason = f"warning: the model was not pushed to the Hub ({first_line(error)})"
        return f"{reason}. It is whole in {folder}; to try again:\n  hf upload {name} {folder}"
    return f"Pushed to {address}"


def _ask_hub(url: str) -> Exception | None:
    """Asks the Hub for a file. Returns None if it has the file, else the problem."""
    replies: list[Exception | None] = [TimeoutError()]

    def ask():
        try:
            get_hf_file_metadata(url, timeout=PROBE_SECONDS)
            replies.append(None)
        except Exception as error:  # every way a network can fail, and the Hub's own refusals
            replies.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # a look-up of the host's name has no time limit of its own
    thread.start()
    thread.join(PROBE_SECONDS)
    return replies[-1]
