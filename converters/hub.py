"""From what the user calls a model to a path on this machine, downloading from Hugging Face where needed."""

import difflib
from pathlib import Path

from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

from converters.checkpoint import pickle_advice
from converters.errors import CheckpointError
from converters.on_disk import DEMO_MODEL, find_on_disk

DATA_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt"]
"""Patterns of what is downloaded: data only, no code and no pickles."""
OTHER_FORMS = ["*/*", "consolidated*"]
"""Sub-folders and Mistral's second copy of the weights."""


def locate(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder or GGUF file of a model, as `open_checkpoint` describes the names.

    Raises:
        CheckpointError: no such path, repo, revision or file; no access; or no network and not in the cache.
    """
    if (path := find_on_disk(model)) is not None:
        return path
    repo, _, file = model.partition(":")
    check_repo_id(repo)
    try:
        if file:
            return Path(
                hf_hub_download(
                    repo,
                    file,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=DATA_FILES,
                ignore_patterns=OTHER_FORMS,
            )
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(_explain(model, revision, error)) from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(_what_else(repo, revision, token, local_files_only))
    return folder


def check_repo_id(name: str) -> None:
    """Refuses what can only be a path, of which nothing is there.

    Raises:
        CheckpointError: it is no repo id.
    """
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith((".gguf", ".json"))
    if not name or looks_like_path or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"{name}: no such file or folder, and not a repo id such as owner/name")


def _explain(model: str, revision: str | None, error: Exception) -> str:
    where = f"{model}@{revision}" if revision else model
    match error:
        case errors.GatedRepoError():
            why = "the repo is gated: accept its terms, then pass token=... or run `hf auth login`"
        case errors.RepositoryNotFoundError():
            why = "no such file, folder or Hugging Face repo (a private repo needs token=...)"
            why += _nearest(model)
        case errors.RevisionNotFoundError():
            why = "the repo has no such revision"
        case errors.RemoteEntryNotFoundError():
            why = "the repo has no such file"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | OSError():
            why = "no such file or folder here, not in the download cache, and Hugging Face cannot be reached"
            why += _nearest(model)
        case _:
            why = "cannot be downloaded"
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"{where}: {why} ({reason[0]})"


def _nearest(name: str) -> str:
    """The name that is known here, for one that no owner's repo has; they have a slash."""
    if "/" in name:
        return ""
    if near := difflib.get_close_matches(name, [DEMO_MODEL]):
        return f"; did you mean {near[0]}?"
    return f"; a repo id is owner/name, and the demo model {DEMO_MODEL}"


def _what_else(repo: str, revision: str | None, token: str | None, offline: bool) -> str:
    """Says what a repo without safetensors has instead; only the listing is fetched."""
    try:
        names = [] if offline else HfApi(token=token).list_repo_files(repo, revision=revision)
    except (errors.HfHubHTTPError, OSError):
        names = []
    gguf_files = [name for name in names if name.endswith(".gguf")]
    if gguf_files:
        return f"{repo} holds GGUF files: choose one as {repo}:{gguf_files[0]} (of {', '.join(gguf_files)})"
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"{repo}: {pickle_advice(pickles)}"
    return f"{repo} has no .safetensors files, and weights in other formats (.bin, .pt) are not loaded"
