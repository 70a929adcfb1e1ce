"""Uploading a folder to the Hugging Face Hub, with huggingface_hub's token and endpoint."""

import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from tensorlm.runtime.errors import UserError, first_line

_LOGIN = "run `hf auth login` or set HF_TOKEN, and check the network"


def create_repository(name: str, *, public: bool) -> None:
    """Create the model repository `OWNER/NAME`; an existing one keeps its visibility.

    Raises:
        UserError: the Hub rejects the request or cannot be reached.
    """
    try:
        HfApi().create_repo(name, private=not public, exist_ok=True)
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(f"--push-to-hub {name}: {first_line(error)} ({_LOGIN})") from None


def upload(folder: Path, name: str, message: str) -> str:
    """Upload all files of `folder` as one commit; returns its URL.

    Raises:
        UserError: the upload failed; the folder is intact, and the message says how to retry.
    """
    try:
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if isinstance(error, RuntimeError):  # of a large file: end its unfinished progress bar
            print(file=sys.stderr)
        again = f"{folder} is intact: continue with `hf upload {name} {folder}`"
        raise UserError(f"--push-to-hub {name}: {first_line(error)} ({again})") from None
    return str(commit.commit_url)
