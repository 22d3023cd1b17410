"""Build the site from the files as GitHub shows them: mkdocs calls these functions (mkdocs.yml, `hooks`).

README.md, CONTRIBUTING.md and CHANGELOG.md become pages, README.md the first; files that pages link to outside of docs/
are copied. Links are rewritten to where the site has their targets. mkdocs wants a blank line before a list or a table
where GitHub wants none.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
FOLDERS = ("examples", "configs")
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
_BLOCK = re.compile(r"([-*] |\d+\. |\|)")
_FENCE = re.compile(r"\s*(```|~~~)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the project that pages are made of or link to."""
    for name, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / name)))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.*")):
            name = path.relative_to(ROOT).as_posix()
            if "__pycache__" not in name and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite a page's links, and set its lists and tables apart."""
    source = next((name for name, target in PAGES.items() if target == page.file.src_uri), f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return posixpath.relpath(_on_site(target), posixpath.dirname(page.file.src_uri) or ".")

    return "\n".join(_set_apart(_LINK.sub(rewrite, markdown).split("\n")))


def _on_site(path: str) -> str:
    """Return where the site has a file of the project; the licence and folders are on the page that shows them."""
    if (ROOT / path).is_dir():
        path = next(file.relative_to(ROOT).as_posix() for file in sorted((ROOT / path).glob("*.*")))
    return PAGES.get(path, path.removeprefix("docs/"))


def _set_apart(lines: list[str]) -> list[str]:
    """Put a blank line before each list or table that follows a line of text, outside of code."""
    written: list[str] = []
    in_code = False
    for line in lines:
        before = written[-1] if written else ""
        starts = _BLOCK.match(line) and before.strip() and not _BLOCK.match(before) and not before.startswith(" ")
        if starts and not in_code:
            written.append("")
        written.append(line)
        in_code ^= bool(_FENCE.match(line))
    return written
