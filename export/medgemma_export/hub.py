"""Fetches a checkpoint from the Hugging Face hub, or finds it in the hub's local cache."""

from pathlib import Path

from medgemma_runtime.errors import CheckpointError

__all__ = ["download"]

# What an export can use of a repository; "*/*" keeps other formats' subfolders out.
_ALLOWED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "spiece.model")
_IGNORED = ("*/*",)


def download(id: str, *, revision: str | None = None) -> Path:
    """The directory of one commit of a hub repository, named after that commit.

    With HF_HUB_OFFLINE=1, or when the hub cannot be reached, a complete copy in the local cache is used.

    Args:
        id: The repository, OWNER/NAME.
        revision: A branch, tag or commit; the main branch if None.

    Raises:
        CheckpointError: If it is gated, absent, or neither reachable nor cached.
    """
    from huggingface_hub import errors, snapshot_download

    asked = id if revision is None else f"{id} at revision {revision}"
    try:
        return Path(
            snapshot_download(
                id, revision=revision, allow_patterns=list(_ALLOWED), ignore_patterns=list(_IGNORED)
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{id} is gated and your account has no access; accept the terms at https://huggingface.co/{id}, "
            "then run: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{id} has no revision {revision}; see its branches and tags on the hub"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{id} is neither a directory here nor a repository on the hub that your account may see; "
            "check the spelling, or run: hf auth login"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{asked} is not complete in the hub's local cache and the hub cannot be reached; go online, "
            "unset HF_HUB_OFFLINE, or name a directory that holds the checkpoint"
        ) from error
    # HTTPError is the root of whichever HTTP client the installed huggingface_hub uses.
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{asked} could not be downloaded ({type(error).__name__}); check the connection and try again"
        ) from error
