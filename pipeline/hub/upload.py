"""Upload files to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pipeline.errors import GattError


def upload(
    repository: str,
    repo_type: Literal["dataset", "model"],
    files: Mapping[str, Path | bytes],
    message: str,
) -> str:
    """Commit `files`, by their paths in the repository, and return the repository's URL.

    A repository that does not exist yet is created as a private one.

    Raises:
        GattError: the Hub refused, or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo, content)
        for path_in_repo, content in files.items()
    ]
    try:
        url = api.create_repo(repository, repo_type=repo_type, private=True, exist_ok=True)
        api.create_commit(repository, operations, commit_message=message, repo_type=repo_type)
    except Exception as error:  # several libraries raise many classes for network, login and 404
        raise GattError(
            f"Cannot upload to {repository} ({type(error).__name__}). Expected owner/name of a "
            f"{repo_type} of yours; `hf auth login` signs you in."
        ) from error
    return str(url)
