"""Models on the Hugging Face Hub: `hf:<user>/<name>`, `hf:<user>/<name>@<revision>`.

A name is accepted in place of any checkpoint. huggingface_hub downloads, with its cache that other programs share, its
revisions (branch, tag or commit) and its offline switch HF_HUB_OFFLINE. `hub_folder` writes what is pushed.
"""

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from consistency.errors import UserError, require

PREFIX = "hf:"
NAME = re.compile(r"hf:((?:[\w-][\w.-]*/)?[\w-][\w.-]*)(?:@([\w-][\w./-]*))?")
"""A name: the repository, and perhaps its revision."""

USUAL = ("*.json", "*.safetensors")
OTHER = (*USUAL, "*.ckpt", "*.pt", "*.pth", "*.bin", "*.pkl")
"""Files of a repository; the second if it has no weights among the first. All are read as data."""
HALF = "*.fp16.*"
"""Weights in half precision beside the others, which take half as long again."""


def fetch(name: str) -> Path:
    """Return the folder of a model on the Hub; download what the cache lacks. Raise `UserError` if that fails."""
    match = NAME.fullmatch(name)
    if match is None:
        expected = "hf:<user>/<name> or hf:<user>/<name>@<revision>"
        raise UserError(expected, name, "for example hf:openai/diffusers-cd_imagenet64_l2")
    folder = _download(match[1], match[2], USUAL, HALF)
    found = any(folder.rglob("*.safetensors"))
    return folder if found else _download(match[1], match[2], OTHER)


def _download(
    repository: str, revision: str | None, patterns: Sequence[str], without: str | None = None
) -> Path:
    hub = library("hf: names")
    try:
        folder = hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=without,
        )
    except Exception as error:  # of the library, its network and its file system
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"the model {repository}{at} on the Hugging Face Hub",
            reason(error),
            "check the name and the network; `hf auth login` opens private models, and with HF_HUB_OFFLINE=1 only what "
            "the library's cache holds is there",
        ) from error
    return Path(folder)


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder, make the repository if it is new, and return its address.

    The Hub checks the card first. private: of a new repository.
    """
    hub = library("push=")
    try:
        hub.ModelCard.load(folder / "README.md").validate()
        api = hub.HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        message = "Model, settings, pipeline and card"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # of the library, its network and its file system
        remedy = f"the folder {folder} is whole: mend the reason, then `hf upload {repository} {folder}` uploads it"
        raise UserError(f"to push to {repository}", reason(error), remedy) from error
    return str(address)


def require_name(repository: str) -> None:
    """Refuse what is no <user>/<name>, before work is done for it."""
    expected = "push=<user>/<name>"
    library("push=")
    require("/" in repository, expected, repository, "name the user or organisation too")
    try:
        import_module("huggingface_hub.utils").validate_repo_id(repository)
    except ValueError as error:
        raise UserError(expected, reason(error), "choose another name") from error


def library(use: str) -> Any:
    """Return the package huggingface_hub; raise `UserError` if it is not installed. use: what needs it."""
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        remedy = "pip install 'consistency[huggingface]', or in this repository huggingface_hub"
        raise UserError(
            f"the package huggingface_hub for {use}", "no such package", remedy
        ) from error


def reason(error: Exception) -> str:
    """Return an error of the library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
