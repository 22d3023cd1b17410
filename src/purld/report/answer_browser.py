"""Collect the data of the page's answer browser: one entry per prompt, within limits of size.

All model output is treated as hostile. It leaves this module only as JSON for a script element that is not executed,
with every character escaped that could end the element or reorder the text around it.
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
from purld.evaluation.recorded import Row
from purld.report.run_data import OPPONENT, RunData
from purld.runs.open import final_model
from purld.runs.thumbnails import ENDINGS

MAX_BYTES = 8_000_000  # texts and numbers of a page, so that the page stays below 10 MB without images
MAX_IMAGE_BYTES = 10_000_000  # images of a page, on top of that
MAX_CHARACTERS = 6000  # one text

# <, > and & could end the script element or open another; U+2028 and U+2029 end lines in old JavaScript;
# lone surrogates have no UTF-8 encoding; the rest are control and direction characters that would change how an
# editor shows the page.
_UNSAFE = re.compile(
    "[<>&\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffc\ud800-\udfff\U000e0000-\U000e007f]"
)


_MIME = {ending: mime for mime, ending in ENDINGS.items()}


@dataclass(frozen=True)
class BrowserData:
    """The browser's data as JSON, with the number of prompts it holds of all, and of images left out."""

    json: str
    shown: int
    total: int
    images_left_out: int = 0


def answer_browser(runs: Sequence[RunData]) -> BrowserData:
    """Return the entries of all runs as JSON for a script element, up to the limits of size.

    Entries with held-out answers come first, and runs alternate, so that the entries left out are the last of each run.
    """
    per_run = [list(_entries(run, run_index)) for run_index, run in enumerate(runs)]
    entries = [entry for round_of_runs in _alternate(per_run) for entry in round_of_runs]
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
    pairs = safe_json([_compared_models(run) for run in runs])
    head = f'"runs": {names}, "titles": {titles}, "pairs": {pairs}, "images": {safe_json(images.urls)}'
    data = f'{{{head}, "entries": [{",".join(kept)}]}}'
    return BrowserData(data, shown=len(kept), total=len(entries), images_left_out=len(images.left_out))


def _compared_models(run: RunData) -> dict[str, str]:
    """Return the run's final model and the one that its training started from; the browser opens where they differ."""
    if run.method is None:
        return {"before": "base", "after": "sft"}
    final = final_model(run.method)
    return {"before": final.parent, "after": final.name}


class _Images:
    """The images of the entries as data URLs, each once, up to `MAX_IMAGE_BYTES`."""

    def __init__(self, runs: Sequence[RunData]) -> None:
        self.urls: dict[str, str] = {}
        self.left_out: set[str] = set()
        self._files_by_run = [run.images for run in runs]
        self._bytes = 0

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add the images of an entry that its run kept, as long as there is room."""
        for name in entry.get("images", ()):
            path = self._files_by_run[entry["run"]].get(name)
            if name in self.urls or path is None or path.suffix not in _MIME:
                continue
            url = f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
            if self._bytes + len(url) > MAX_IMAGE_BYTES:
                self.left_out.add(name)
                continue
            self._bytes += len(url)
            self.urls[name] = url


def safe_json(value: object) -> str:
    """Return JSON that is inert inside HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(units[::2], units[1::2]))


def _alternate(per_run: Sequence[list[Any]]) -> Iterable[list[Any]]:
    """Yield the first entries of all runs, then the second entries, and so on."""
    for index in range(max((len(entries) for entries in per_run), default=0)):
        yield [entries[index] for entries in per_run if index < len(entries)]


def _entries(run: RunData, run_index: int) -> Iterable[dict[str, Any]]:
    groups = _group_by_prompt(run.groups)
    answers, verdicts = _answers_by_prompt(run), _verdicts_by_answer(run)
    for prompt_id in dict.fromkeys([*answers, *groups]):
        group, answered = groups.get(prompt_id), answers.get(prompt_id, {})
        entry = {
            "id": prompt_id,
            "run": run_index,
            **_question_fields(group, answered),
            "anchor": _clip(group["anchor"] if group else run.anchors.get(prompt_id)),
            "group": _group_fields(group) if group else None,
            "answers": [
                {
                    "model": model,
                    "samples": [_sample_fields(row, verdicts[model, prompt_id, _verdict_sample(row)]) for row in rows],
                }
                for model, rows in answered.items()
            ],
        }
        yield {key: value for key, value in entry.items() if value is not None}


def _group_by_prompt(groups: Sequence[Row]) -> dict[str, Row]:
    """Return one group per prompt: the one measured again at the end of Stage II, or else the last."""
    last = {group["prompt_id"]: group for group in groups}
    return last | {group["prompt_id"]: group for group in groups if "policy_after" in group}


def _answers_by_prompt(run: RunData) -> dict[str, dict[str, list[Row]]]:
    """Return the held-out answers by prompt and model, greedy answers last.

    Prompts that only the opponent answered are left out.
    """
    answers: dict[str, dict[str, list[Row]]] = {}
    for model in dict.fromkeys([*run.answers, *run.greedy]):
        greedy = [row | {"greedy": True} for row in map(dict, run.greedy.get(model, ()))]
        for row in (*run.answers.get(model, ()), *greedy):
            if model != OPPONENT or row["prompt_id"] in answers:
                answers.setdefault(row["prompt_id"], {}).setdefault(model, []).append(row)
    return answers


def _question_fields(group: Row | None, answered: dict[str, list[Row]]) -> dict[str, Any]:
    """Return the text of the prompt and the names of its images."""
    rows = [group] if group else [row for rows in answered.values() for row in rows]
    recorded = next((row for row in rows if row.get("prompt")), {"prompt": ""})
    return {"prompt": _clip(recorded["prompt"]), "images": recorded.get("images")}


def _verdicts_by_answer(run: RunData) -> dict[tuple[str, str, int | None], list[Row]]:
    verdicts: dict[tuple[str, str, int | None], list[Row]] = defaultdict(list)
    for model, rows in run.verdicts.items():
        for row in rows:
            verdicts[model, row["prompt_id"], row["sample"]].append(row)
    return verdicts


def _verdict_sample(row: Row) -> int | None:
    """Return the sample whose verdicts belong to an answer; None for a greedy answer, which is not judged."""
    return None if row.get("greedy") else row.get("sample")


def _sample_fields(row: Row, verdicts: Sequence[Row]) -> dict[str, Any]:
    sample = {key: row[key] for key in ("tokens", "finished", "correct", "greedy") if key in row}
    sample["text"] = _clip(row["text"])
    if verdicts:
        sample["verdicts"] = [{"outcome": v["outcome"], "a": v["model_is_a"], "raw": _clip(v["raw"])} for v in verdicts]
    return sample


def _group_fields(group: Row) -> dict[str, Any]:
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
    fields = {"step": group["step"], "anchor_score": _rounded(group["anchor_score"]), "candidates": candidates}
    if group.get("left_out"):
        fields["left_out"] = True
    if "policy_after" in group:
        fields["divergence"] = [_rounded(group["label_divergence"]), _rounded(group["label_divergence_after"])]
    return fields


def _rounded(value: Any) -> Any:
    """Return a float with 4 decimals, None if it is not finite, and any other value unchanged."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def _clip(text: str | None) -> str | None:
    """Return the text, cut after `MAX_CHARACTERS` with a note on how much is missing."""
    if text is None or len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}\n[… {len(text) - MAX_CHARACTERS:,} more characters]"
