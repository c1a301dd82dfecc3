"""Uploading an exported folder to a model hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from lit_vlm.core.fetch import reason


def check_push(name: str) -> None:
    """Find out before minutes of work whether a folder can be uploaded under a name.

    Raises:
        ValueError: for a name that no hub takes, without a login, or where the hub does not answer.
    """
    if name.count("/") != 1:
        raise ValueError(f"--push {name}: expected ORGANISATION/NAME or USER/NAME")
    try:
        HfApi().repo_exists(name)  # looks at the letters of the name
        HfApi().whoami()
    except HFValidationError as error:
        raise ValueError(f"--push {name}: {error}") from error
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        why = f"not logged in ({reason(error)}); run `hf auth login`, or set HF_TOKEN"
        raise ValueError(f"--push {name}: {why}") from error
    except Exception as error:  # of the HTTP client, which versions of huggingface_hub have changed
        raise ValueError(f"--push {name}: the hub does not answer: {reason(error)}") from error


def push(folder: Path, name: str) -> str:
    """Upload a folder as a model; one that is not there yet is made, and is private.

    Returns:
        its address.

    Raises:
        ValueError: where the hub refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of lit-vlm")
    except Exception as error:  # the hub refuses, or the HTTP client fails in its own way
        raise ValueError(f"{folder} was written, and not uploaded to {name}: {reason(error)}") from error
    return str(address)
