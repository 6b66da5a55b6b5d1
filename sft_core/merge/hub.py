"""A finished model folder onto the Hugging Face hub, by its own library. In: folder, repository id. Out: an address."""

from pathlib import Path

from sft_core.errors import ModelError


def push(folder: Path, repository: str) -> str:
    """Upload everything; the repository is made if it is not there, private. ModelError if that fails."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError, OSError, ValueError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"--push-to {repository!r}: not uploaded ({why}); {folder} is complete, upload it with `hf upload`"
        ) from None
    return str(commit)
