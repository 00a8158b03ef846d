"""Weights to and from the Hugging Face hub (optional extra ``hub``)."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.checks import Failed
from nnunetv2_hiendmae.weights.file import WEIGHTS_FILE, Weights, load_weights
from nnunetv2_hiendmae.weights.model_card import model_card

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubError(Failed):
    """The hub refused or could not be reached; the text says why."""


def push(file: Path, repo: str, private: bool, licence: str) -> str:
    """Upload a weights file with its model card, as one commit; the repository is made if need be.

    Returns:
        Address of the repository.

    Raises:
        ValueError: no weights file, or an impossible repository name.
        HubError: see there.
    """
    weights = load_weights(file)
    hub = client(repo)
    card = model_card(weights, repo, licence).encode()
    api = hub.HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        operations = [
            hub.CommitOperationAdd(WEIGHTS_FILE, str(file)),
            hub.CommitOperationAdd("README.md", card),
        ]
        api.create_commit(repo, operations, commit_message=f"Weights, sha256 {weights.sha256}")
    except Exception as error:  # the client's errors have many roots: HTTP, network, login
        raise HubError(reason(error)) from None
    return str(address)


def pull(repo: str, output: Path, revision: str | None) -> Weights:
    """Download a weights file; it appears under ``output`` only when it has been checked.

    Raises:
        ValueError: what was downloaded is no weights file, or an impossible repository name.
        HubError: see there.
    """
    hub = client(repo)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".hiendmae_") as folder:
        try:
            file = hub.hf_hub_download(repo, WEIGHTS_FILE, revision=revision, local_dir=folder)
        except Exception as error:
            raise HubError(reason(error)) from None
        weights = load_weights(file)
        os.replace(file, output)
    return replace(weights, path=output)


def client(repo: str) -> Any:
    """The hub's own client library. ``ValueError`` if it is not installed, or the name is none."""
    if not REPO.fullmatch(repo):
        raise ValueError(f"-repo '{repo}' must be USER/NAME.")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError("the hub's client is not installed. Run: pip install 'huggingface_hub>=0.34'") from None
    return huggingface_hub


def reason(error: Exception) -> str:
    """What the client says, in one line, and the remedy where it is known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        text += " Log in with 'hf auth login', or set HF_TOKEN to a token that may do this."
    return text
