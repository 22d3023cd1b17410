"""Find what a model directory says of its licence, so that an exported model says it too."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import try_to_load_from_cache

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?\n)---\s*(?:\n|\Z)", re.DOTALL)
_LEGAL = re.compile(r"(license|licence|copying|notice|use_policy)([._-].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class BaseLicence:
    """What the folder of a base model states.

    Attributes:
        name: the licence that its model card names; None if it names none.
        files: its licence texts and notices.
    """

    name: str | None
    files: tuple[Path, ...]

    def __str__(self) -> str:
        texts = ", ".join(file.name for file in self.files)
        if self.name is None:
            return f"see {texts}" if texts else "not stated"
        return f"{self.name} (see {texts})" if texts else self.name

    def copy_files(self, folder: Path) -> None:
        """Copy the texts and notices to a folder."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)


def read_licence(model: str) -> BaseLicence:
    """Return what the folder of a model directory, or of a hub id in the local cache, states of its licence."""
    folder = _folder_of(model)
    if folder is None:
        return BaseLicence(None, ())
    files = sorted(file for file in folder.iterdir() if file.is_file() and _LEGAL.fullmatch(file.name))
    return BaseLicence(_named_in_card(folder / "README.md"), tuple(files))


def _folder_of(model: str) -> Path | None:
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    cached = try_to_load_from_cache(model, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _named_in_card(card: Path) -> str | None:
    """Return the licence in a card's front matter: its identifier, or the name that stands for `other`."""
    try:
        matter = _FRONT_MATTER.match(card.read_text(encoding="utf-8"))
        values = yaml.safe_load(matter[1]) if matter else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(values, dict):
        return None
    name = values.get("license")
    if name == "other":
        name = values.get("license_name") or name
    return name if isinstance(name, str) and name.strip() else None
