"""Upload files to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pipeline.errors import GattError


def upload(
    repository: str,
    kind: Literal["dataset", "model"],
    files: Mapping[str, Path | bytes],
    message: str,
) -> str:
    """Commit `files` (by their names there) to `repository`, made private where it is new; its address.

    Raises:
        GattError: the Hub refused, or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()
    ]
    try:
        address = api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        api.create_commit(repository, operations, commit_message=message, repo_type=kind)
    except (
        Exception
    ) as error:  # network, authentication and 404 are many classes of several libraries
        raise GattError(
            f"Cannot upload to {repository} ({type(error).__name__}). Expected owner/name of a {kind} of yours; "
            "`hf auth login` signs you in."
        ) from error
    return str(address)
