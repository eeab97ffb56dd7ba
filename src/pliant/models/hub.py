"""Giving an exported folder to the Hugging Face hub: first whether that can work, then the upload."""

import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from pliant.errors import CheckpointError

# The error of the client that huggingface_hub speaks HTTP with, which is not the same one in all its versions.
UNREACHABLE: tuple[type[Exception], ...] = (HfHubHTTPError.__mro__[1], OSError)


def check_push(repo: str) -> None:
    """Checks that the hub can be reached, and knows who is asking.

    Args:
        repo: ``owner/name``.

    Raises:
        CheckpointError: The name is no repository's, the hub cannot be reached, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        raise CheckpointError(
            f"push_to_hub must name a repository as owner/name; got {repo!r}: {error} Use letters, digits, '-', '_' "
            "and '.'."
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"push_to_hub={repo!r} needs the hub, and HF_HUB_OFFLINE is set. Unset it, or export without pushing."
        )
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise CheckpointError(f"push_to_hub={repo!r} needs a login; there is none. Log in: hf auth login") from error
    except UNREACHABLE as error:
        raise CheckpointError(
            f"push_to_hub={repo!r} needs the hub, which could not be asked who you are: {error} Check the connection "
            "and the login, or export without pushing."
        ) from error


def push(folder: str | os.PathLike, repo: str, *, private: bool = False) -> str:
    """Uploads ``folder`` as one commit, making the repository if there is none, and returns its address.

    Raises:
        CheckpointError: The hub refused, the connection broke, or ``private`` is asked of a repository that is there
            and public; ``folder`` is as it was.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:  # one that was there keeps its visibility
            raise CheckpointError(
                f"private needs a repository that is new or private; {repo!r} is public, and nothing was uploaded. "
                f"{str(folder)!r} is complete: choose another repository, or make this one private, and hf upload it."
            )
        api.upload_folder(repo_id=repo, folder_path=Path(folder), commit_message="Model exported by pliant")
    except UNREACHABLE as error:
        raise CheckpointError(
            f"push_to_hub={repo!r} failed: {error} {str(folder)!r} is complete; upload it later: hf upload {repo} "
            f"{folder}"
        ) from error
    return str(url)
