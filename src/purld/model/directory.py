"""Find a model directory: a folder, or a hub id in the local cache. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

from purld.errors import UserError
from purld.hub_offline import is_hub_model_cached


def check_model_directory(model: str, key: str = "student.model") -> None:
    """Raise an error for a path that is not a model directory, and for a hub id that is not in the local cache.

    Args:
        model: the directory or hub id.
        key: the configuration's key that names it, for the message.

    Raises:
        UserError: `model` is a folder without a readable config.json, is a file, does not exist, or would have to be
            downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{key}: {model} is not a model directory; it holds no config.json.")
        try:
            json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{key}: {model}/config.json is not readable JSON.") from None
    elif path.is_file():
        raise UserError(f"{key}: {model} is a file; give the directory that holds config.json.")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"{key}: {model} does not exist; give a model directory.")
    elif not is_hub_model_cached(model):
        raise UserError(
            f"{key}: {model} is neither a directory here nor in the Hugging Face cache, and purld downloads "
            f"nothing; fetch it before with `hf download {model}`."
        )


def find_model_folder(model: str, key: str = "student.model") -> Path:
    """Return the folder of a model directory or of a hub id in the local cache.

    Raises:
        UserError: see `check_model_directory`.
    """
    check_model_directory(model, key)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(model, "config.json"))).parent
