"""Look-up of models on the Hugging Face Hub before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sinkscope.errors import ModelError
from sinkscope.models.shards import INDEX, check_index

_TIMEOUT = 10.0
_TOKEN_HINT = "accept its terms on its page and log in with `hf auth login` (or set HF_TOKEN)"


@dataclass(frozen=True)
class HubModel:
    """A model on the hub or in the local hub cache.

    Attributes:
        revision: Commit to read.
        files: Names of its files (in the cache, of the downloaded ones).
    """

    revision: str
    files: tuple[str, ...]


def find_on_hub(name: str, revision: str | None, otherwise: str) -> HubModel:
    """Resolve a hub id to a commit.

    Args:
        name: Hub id, for example "openai-community/gpt2".
        revision: Branch, tag or commit; the default branch if ``None``.
        otherwise: End of error messages: the kinds of name that are accepted.

    Raises:
        ModelError: If it does not exist, is gated, or the hub cannot be reached and the model is
            not in the local cache.
    """
    cached = _in_cache(name, revision, otherwise)
    if constants.is_offline_mode():
        if cached is None:
            raise ModelError(
                f"{name!r} is not in the local hub cache, and HF_HUB_OFFLINE prevents a download "
                f"from the Hugging Face Hub; {otherwise}"
            )
        return cached
    try:
        info = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise ModelError(f"{name} is a gated model: {_TOKEN_HINT}.") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on the Hugging Face Hub.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model {name!r} on the Hugging Face Hub (a private one needs "
            f"`hf auth login`); {otherwise}"
        ) from error
    except Exception as error:  # the HTTP client raises various errors without a network
        if cached is None:
            raise ModelError(
                f"{name!r} was looked up on the Hugging Face Hub, which could not be reached "
                f"({type(error).__name__}); {otherwise}"
            ) from error
        return cached
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    return HubModel(info.sha or revision or "main", files)


def check_hub_indices(name: str, repo: HubModel) -> None:
    """Download the weight indices of a sharded checkpoint and check the files they name.

    Raises:
        ModelError: If an index names anything but safetensors files of the checkpoint.
    """
    for file in repo.files:
        if file.endswith(INDEX):
            try:
                index = hf_hub_download(name, file, revision=repo.revision, etag_timeout=_TIMEOUT)
            except (OSError, ValueError, HfHubHTTPError) as error:
                raise ModelError(
                    f"{file} of {name} cannot be fetched ({type(error).__name__})."
                ) from error
            check_index(Path(index), name)


def _in_cache(name: str, revision: str | None, otherwise: str) -> HubModel | None:
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"{name!r} cannot be the name of a model; {otherwise}") from error
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    # Snapshot folders are named after their commit.
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return HubModel(folder.name, tuple(files))
