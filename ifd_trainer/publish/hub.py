"""Push a selected set, its card and its plot to a data set repository of a hub, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import HubError, UserError, one_line


def check_repository(name: str) -> None:
    """Raise ValueError now for a name that no hub takes."""
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1:
        raise UserError(f"--push-to-hub takes USER/NAME, got {name!r}.")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"--push-to-hub takes USER/NAME, got {name!r}: {one_line(error)}") from error


def push_files(repository: str, files: Mapping[str, Path], private: bool = False) -> str:
    """Commit files to a data set repository, which is made if it is not there.

    Args:
        repository: USER/NAME.
        files: local files by their path in the repository.
        private: whether a new repository is private; one that is there stays as it is.

    Returns:
        The address of the repository.

    Raises:
        HubError: when the hub cannot be reached or refuses; the message names the local files.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    # Not `upload_folder`: it cannot push cherry.md as README.md, and takes the names of the files beside others for
    # patterns ("[x] b.csv" pushes nothing). `push_to_hub` of `datasets` would write other files than those here.
    try:
        url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        api.create_commit(
            repository, operations, repo_type="dataset", commit_message="Rows selected by IFD, with their card"
        )
    except Exception as error:  # which classes a broken connection raises differs from release to release of the client
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        paths = ", ".join(map(str, files.values()))
        raise HubError(
            f"Could not push to {repository}: {first}. All files are written ({paths}). Check the network and "
            "`hf auth login`, and run the same command again."
        ) from error
    return str(url)
