"""The data behind the page's browser: one entry per prompt, small enough to stay quick.

Everything a model wrote is hostile here. It leaves this module only as JSON inside a script element that is
not executed, with every character escaped that could end the element or reorder the text around it.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from purld.display.titles import model_title
from purld.report.run_data import OPPONENT, Row, RunData
from purld.runs.thumbnails import ENDINGS

MAX_BYTES = 8_000_000  # of texts and numbers in a page, so that the whole stays below 10 MB
MAX_IMAGE_BYTES = 10_000_000  # of its images on top of that
MAX_CHARACTERS = 6000  # of one text

# <, > and & could end the script element or open another; U+2028 and U+2029 end lines in old JavaScript;
# lone surrogates have no UTF-8; the rest are control and direction characters that would change what an
# editor shows of this file.
_UNSAFE = re.compile(
    "[<>&\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffc\ud800-\udfff\U000e0000-\U000e007f]"
)


_MIME = {ending: mime for mime, ending in ENDINGS.items()}


@dataclass(frozen=True)
class BrowserData:
    """The browser's data and how much of everything it holds."""

    json: str
    shown: int
    total: int
    images_left_out: int = 0


def answer_browser(runs: Sequence[RunData]) -> BrowserData:
    """The entries of all runs as JSON for a script element; those that would not fit are left out.

    Entries with held-out answers come first, and runs take turns, so that what is left out is the tail.
    """
    per_run = [list(_entries(run, place)) for place, run in enumerate(runs)]
    entries = [entry for turn in _turns(per_run) for entry in turn]
    kept: list[str] = []
    size = 0
    images = _Images(runs)
    for entry in entries:
        text = safe_json(entry)
        size += len(text.encode())
        if size > MAX_BYTES:
            break
        kept.append(text)
        images.add(entry)
    names = safe_json([run.name for run in runs])
    titles = safe_json({m: model_title(m) for run in runs for m in (*run.answers, *run.greedy)})
    urls = safe_json(images.urls)
    data = f'{{"runs": {names}, "titles": {titles}, "images": {urls}, "entries": [{",".join(kept)}]}}'
    return BrowserData(data, shown=len(kept), total=len(entries), images_left_out=len(images.left_out))


class _Images:
    """The images of the entries that are shown, each once, as data URLs; those that would not fit are left out."""

    def __init__(self, runs: Sequence[RunData]) -> None:
        self.urls: dict[str, str] = {}
        self.left_out: set[str] = set()
        self._files = [run.images for run in runs]
        self._size = 0

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take what an entry refers to, if its run kept it and there is room."""
        for name in entry.get("images", ()):
            path = self._files[entry["run"]].get(name)
            if name in self.urls or path is None or path.suffix not in _MIME:
                continue
            url = f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
            if self._size + len(url) > MAX_IMAGE_BYTES:
                self.left_out.add(name)
                continue
            self._size += len(url)
            self.urls[name] = url


def safe_json(value: object) -> str:
    """JSON that is inert inside HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(units[::2], units[1::2]))


def _turns(per_run: Sequence[list[Any]]) -> Iterable[list[Any]]:
    """The first of every run, then the second of every run, and so on."""
    for place in range(max((len(entries) for entries in per_run), default=0)):
        yield [entries[place] for entries in per_run if place < len(entries)]


def _entries(run: RunData, place: int) -> Iterable[dict[str, Any]]:
    groups = _group_of_each(run.groups)
    answers, verdicts = _by_prompt(run), _verdicts(run)
    for prompt_id in dict.fromkeys([*answers, *groups]):
        group, answered = groups.get(prompt_id), answers.get(prompt_id, {})
        entry = {
            "id": prompt_id,
            "run": place,
            **_question(group, answered),
            "anchor": _clip(group["anchor"] if group else run.anchors.get(prompt_id)),
            "group": _group(group) if group else None,
            "answers": [
                {"model": model, "samples": [_sample(row, verdicts[model, prompt_id, _key(row)]) for row in rows]}
                for model, rows in answered.items()
            ],
        }
        yield {key: value for key, value in entry.items() if value is not None}


def _group_of_each(groups: Sequence[Row]) -> dict[str, Row]:
    """The group of each prompt that was measured again at the end, or else its last."""
    found = {group["prompt_id"]: group for group in groups}
    return found | {group["prompt_id"]: group for group in groups if "policy_after" in group}


def _by_prompt(run: RunData) -> dict[str, dict[str, list[Row]]]:
    """Held-out answers by prompt and model, a greedy one after the drawn ones; no opponent alone."""
    found: dict[str, dict[str, list[Row]]] = {}
    for model in dict.fromkeys([*run.answers, *run.greedy]):
        greedy = [row | {"greedy": True} for row in map(dict, run.greedy.get(model, ()))]
        for row in (*run.answers.get(model, ()), *greedy):
            if model != OPPONENT or row["prompt_id"] in found:
                found.setdefault(row["prompt_id"], {}).setdefault(model, []).append(row)
    return found


def _question(group: Row | None, answered: dict[str, list[Row]]) -> dict[str, Any]:
    """What was asked, and the names of the images in it."""
    rows = [group] if group else [row for rows in answered.values() for row in rows]
    asked = next((row for row in rows if row.get("prompt")), {"prompt": ""})
    return {"prompt": _clip(asked["prompt"]), "images": asked.get("images")}


def _verdicts(run: RunData) -> dict[tuple[str, str, int | None], list[Row]]:
    found: dict[tuple[str, str, int | None], list[Row]] = defaultdict(list)
    for model, rows in run.verdicts.items():
        for row in rows:
            found[model, row["prompt_id"], row["sample"]].append(row)
    return found


def _key(row: Row) -> int | None:
    """Which verdicts belong to an answer: those on its sample, and none to a greedy one."""
    return None if row.get("greedy") else row.get("sample")


def _sample(row: Row, verdicts: Sequence[Row]) -> dict[str, Any]:
    sample = {key: row[key] for key in ("tokens", "finished", "correct", "greedy") if key in row}
    sample["text"] = _clip(row["text"])
    if verdicts:
        sample["verdicts"] = [{"outcome": v["outcome"], "a": v["model_is_a"], "raw": _clip(v["raw"])} for v in verdicts]
    return sample


def _group(group: Row) -> dict[str, Any]:
    columns = {
        "text": [_clip(text) for text in group["candidates"]],
        "score": group.get("scores"),
        "margin": group.get("margins"),
        "u": group.get("confidences"),
        "D": group.get("labels"),
        "q": group.get("policy_before"),
        "after": group.get("policy_after"),
        "advantage": group.get("advantages"),
        "tokens": group["lengths"],
    }
    names = [name for name, values in columns.items() if values is not None]
    candidates = [dict(zip(names, map(_rounded, row))) for row in zip(*(columns[name] for name in names))]
    found = {"step": group["step"], "anchor_score": _rounded(group["anchor_score"]), "candidates": candidates}
    if "policy_after" in group:
        found["divergence"] = [_rounded(group["label_divergence"]), _rounded(group["label_divergence_after"])]
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def _clip(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}\n[… {len(text) - MAX_CHARACTERS:,} more characters]"
