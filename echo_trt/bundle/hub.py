"""Checkpoints from the Hugging Face hub, fetched once into its own cache (``HF_HOME``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from echo_trt.errors import UserError

CONFIG = ("*.json",)  # shapes, tokenizer, generation settings and the index of weights
CHECKPOINT = (*CONFIG, "*.safetensors", "*.jinja", "*.pt")
#: Other formats of the same weights, and what trainers leave behind.
OTHERS = ("original/*", "*/*", "training_args*", "optimizer*", "scheduler*")


def from_hub(name: str, files: Sequence[str] = CHECKPOINT) -> Path:
    """Return the local folder of the repository ``name``, OWNER/NAME, with those ``files`` that it has.

    Raises UserError where it is not on the hub, asks for a licence, or is neither reachable nor in the cache.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(OTHERS)))
    except GatedRepoError:
        raise UserError(
            f"model {name} is gated; accept its licence at {constants.ENDPOINT}/{name}, and set HF_TOKEN or run hf "
            "auth login."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"model {name} is not on the hub, or is private; check its name, set HF_TOKEN, or give a local folder."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:  # OSError: no connection, no space
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _reason(error)
        raise UserError(
            f"model {name} is not in {constants.HF_HUB_CACHE} and cannot be fetched ({why}); connect to the hub, copy "
            "the model there, or give a local folder."
        ) from None


def _reason(error: Exception) -> str:
    """Return the cause's first clause: the library's own advice comes with links and line breaks."""
    cause = error.__cause__ or error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return str(cause).strip().split("\n")[0].split(". ")[0].rstrip(".")[:160] or type(cause).__name__
