"""Fetch the parts of a composed checkpoint, folders or Hub repos."""

import os
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors.torch import load_file

TERNARY_MODULES = r"language_model\.layers\..*_proj"
IMAGE_TOKEN = "<image>"
VISION_PREFIX, TEXT_PREFIX = "model.vision_tower.timm_model.", "model.language_model."


def is_local(source: str, flag: str) -> bool:
    """Tell whether `source` is on disk; if not it must look like a Hub id.

    Raises:
        ValueError: it is neither.
    """
    if os.path.exists(source):
        return True
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return False
    raise ValueError(f"{flag} {source!r} is neither a folder on this machine nor a Hub id (owner/name).")


def fetch(source: str, name: str, revision: str | None) -> Path | None:
    """Find a file of a folder or Hub repo, None if absent.

    Raises:
        ValueError: the repo cannot be reached and is not cached.
    """
    if is_local(source, "--vision"):
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except (OSError, EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            return None
        at = f" at revision {revision}" if revision else ""
        message = f"--vision {source!r}{at} is no local folder and cannot be had from the Hub: {error}"
        raise ValueError(message) from error


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a weight file, safetensors or torch's."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
