"""Uploading a checkpoint to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.quant.errors import CheckpointError, FewbitsError

_NEVER = (".*", "*.tmp", "*.py", "*.pkl", "*.bin")


class PushError(FewbitsError, ValueError):
    """An upload that the hub refuses."""


@dataclass(frozen=True)
class Upload:
    """What would be uploaded."""

    directory: Path
    repo: str
    files: list[Path]

    @property
    def bytes(self) -> int:
        return sum(p.stat().st_size for p in self.files)


def prepare(directory: Path, repo: str) -> Upload:
    """What there is to upload. Raises CheckpointError where the directory holds no finished checkpoint."""
    if (directory / ".fewbits").is_dir():
        raise CheckpointError(f"{directory}: holds an unfinished run; quantize --resume finishes it")
    if not (directory / "config.json").is_file() or not list(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory}: holds no checkpoint; name a folder that fewbits quantize or export made")
    files = [p for p in sorted(directory.iterdir()) if p.is_file() and not any(p.match(n) for n in _NEVER)]
    return Upload(directory, repo, files)


def push(upload: Upload, *, private: bool = False) -> str:
    """Make the repository where there is none, upload in one commit, and return its address.

    Raises:
        PushError: no token, no permission, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    transport: Any = HfHubHTTPError.__mro__[1]  # the error of whichever HTTP library the hub's client uses
    api = HfApi()
    try:
        repo = api.create_repo(upload.repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo, folder_path=upload.directory, allow_patterns=[p.name for p in upload.files],
            commit_message="Upload a fewbits checkpoint",
        )
    except (HFValidationError, transport, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PushError(f"{upload.repo}: the hub refuses ({reason}); hf auth login, and check the name and your rights "
                        "to it") from error
    return str(commit.repo_url)
