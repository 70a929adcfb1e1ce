"""Upload an exported folder to the Hugging Face Hub (token and endpoint as huggingface_hub's)."""

import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from tensorlm.runtime.errors import UserError

_LOGIN = "run `hf auth login` or set HF_TOKEN, and check the network"


def create_repository(name: str, *, public: bool) -> None:
    """Make sure that model repository `OWNER/NAME` exists; the visibility of one stays as it is.

    Raises:
        UserError: the Hub refused, or cannot be reached.
    """
    try:
        HfApi().create_repo(name, private=not public, exist_ok=True)
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(f"--push-to-hub {name}: {_first_line(error)} ({_LOGIN})") from None


def upload(folder: Path, name: str, message: str) -> str:
    """Upload all files of `folder` as one commit; returns its address.

    Raises:
        UserError: the upload failed; the folder is still there, and the line says how to go on.
    """
    try:
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if isinstance(error, RuntimeError):  # of a large file, whose bar stands unfinished
            print(file=sys.stderr)
        again = f"{folder} is whole: go on with `hf upload {name} {folder}`"
        raise UserError(f"--push-to-hub {name}: {_first_line(error)} ({again})") from None
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
