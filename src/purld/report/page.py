"""One self-contained HTML page about one run or several: opens from a file, asks no network for anything.

The page's only script is named in its content-security policy by its hash, so that nothing a model wrote can
run even if it escaped its place as text. A section whose input is missing is left out.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from purld.display.titles import model_title
from purld.report.answer_browser import BrowserData, answer_browser
from purld.report.cost import cost_section
from purld.report.figures import draw_figures
from purld.report.headline import Headline, Tone, write_headline
from purld.report.markup import PageSection, escape_text, figure_grid
from purld.report.run_data import RunData, read_run
from purld.report.sensitivity import sensitivity_section
from purld.report.tables import results_section
from purld.runs.files import atomic_write
from purld.runs.run_dir import RunDir

_WHOLE_TRAINING = 4  # up to so many runs on a page, each has its own sentence and all its training figures


def write_report(run_paths: Sequence[RunDir], out: Path) -> None:
    """Write the page about the given runs to `out`.

    Raises:
        UserError: a file of a run is damaged.
    """
    page = _page(_distinct([read_run(path) for path in run_paths]))
    with atomic_write(out) as handle:
        handle.write(page)


def _distinct(runs: Sequence[RunData]) -> list[RunData]:
    """The runs with a number behind names that occur more than once."""
    occurs = Counter(run.name for run in runs)
    seen: Counter[str] = Counter()
    named = []
    for run in runs:
        seen[run.name] += 1
        named.append(replace(run, name=f"{run.name} ({seen[run.name]})") if occurs[run.name] > 1 else run)
    return named


def _page(runs: Sequence[RunData]) -> str:
    data = answer_browser(runs)
    script, style = _asset("browser.js"), _asset("page.css")
    training = _convergences(runs) if len(runs) > _WHOLE_TRAINING else _trainings(runs)
    numbers = [sensitivity_section(runs), results_section(runs), *training, cost_section(runs)]
    every = [*numbers, _browser(data), _configs(runs)]
    sections = [section for section in every if section.body]
    names = ", ".join(run.name for run in runs)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape_text(names)} · purld report</title>
<style>
{style}</style>
</head>
<body>
{_header(runs, sections)}
<main>
{"".join(section.html() for section in sections)}</main>
<script type="application/json" id="data">{data.json}</script>
<script>{script}</script>
</body>
</html>
"""


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def _asset(name: str) -> str:
    return files("purld.report").joinpath("assets", name).read_text(encoding="utf-8")


def _header(runs: Sequence[RunData], sections: Sequence[PageSection]) -> str:
    said = [(run, write_headline(run)) for run in runs]
    if len(said) == 1:
        run, sentence = said[0]
        lines = f'<h1 class="verdict {sentence.tone}">{escape_text(sentence.text)}</h1>{_facts(run)}'
    else:
        each = "".join(
            f'<p class="verdict {s.tone}"><b>{escape_text(run.name)}:</b> {escape_text(s.text)}</p>' for run, s in said
        )
        if len(runs) > _WHOLE_TRAINING:
            each = f"<details><summary>Each run in a sentence</summary>{each}</details>"
        lines = f'<h1 class="verdict">{_tally(said)}</h1>{each}'
    links = "\n".join(section.link() for section in sections)
    brand = '<p class="brand">purld <span>report</span></p>'
    return f'<header>\n{brand}\n{lines}\n<nav aria-label="Sections">\n{links}\n</nav>\n</header>'


def _tally(said: Sequence[tuple[RunData, Headline]]) -> str:
    """How many runs came out which way, against the model that each started from."""
    words: dict[Tone, str] = {
        "better": "better than the model it started from",
        "worse": "worse than the model it started from",
        "open": "not told apart from the model it started from",
        "none": "without a comparison",
    }
    counts = Counter(sentence.tone for _, sentence in said)
    found = ", ".join(f"{counts[tone]} {word}" for tone, word in words.items() if counts[tone])
    return f"{len(said)} runs side by side: {found}."


def _facts(run: RunData) -> str:
    """What was trained, with whose answers, by which method."""
    student, teacher = run.config.get("student", {}), run.config.get("teacher", {})
    facts = {
        "Run": run.name,
        "Student": student.get("model"),
        "Teacher": teacher.get("model") or teacher.get("path"),
        "Method": model_title(run.method) if run.method else None,
        **_judging(run),
        "Seed": run.results.get("seed", run.config.get("seed")),
    }
    items = (f"<div><dt>{name}</dt><dd>{escape_text(v)}</dd></div>" for name, v in facts.items() if v is not None)
    return f'<dl class="facts">{"".join(items)}</dl>'


def _judging(run: RunData) -> dict[str, str | None]:
    """Whose answers the models met, and who judged."""
    settings = run.config.get("evaluate") or {}
    judge, opponent = settings.get("judge"), settings.get("opponent")
    if not judge or not opponent:
        return {}
    return {"Opponent": opponent.get("path", "the teacher"), "Judge": judge.get("model") or judge.get("path")}


def _trainings(runs: Sequence[RunData]) -> list[PageSection]:
    """All training figures, a section for each run."""
    headings = ["Training"] if len(runs) == 1 else [f"Training: {run.name}" for run in runs]
    return [
        PageSection(f"training-{place}", heading, figure_grid(draw_figures(run, prefix=f"run{place}")))
        for place, (run, heading) in enumerate(zip(runs, headings, strict=True))
    ]


def _convergences(runs: Sequence[RunData]) -> list[PageSection]:
    """One section for many runs, so that the page stays small; each run's own page has the rest."""
    found = [
        replace(drawing, heading=f"{run.name}: {drawing.heading.lower()}")
        for place, run in enumerate(runs)
        for drawing in draw_figures(run, prefix=f"run{place}", whole=False)
    ]
    return [PageSection("training", "Training", figure_grid(found))]


def _browser(data: BrowserData) -> PageSection:
    left_out = (
        f'<p class="note">The first {data.shown:,} of {data.total:,} prompts are here, to keep this page small; '
        "the run directory has them all under generations/.</p>\n"
        if data.shown < data.total
        else ""
    )
    if data.images_left_out:
        left_out += (
            f'<p class="note">{data.images_left_out:,} images are not here, to keep this page small; '
            "they are under generations/images/ in the run directory.</p>\n"
        )
    place = '<div id="browser"><noscript>The browser of prompts and answers needs JavaScript.</noscript></div>\n'
    return PageSection("answers", "Prompts and answers", left_out + place if data.total else "")


def _configs(runs: Sequence[RunData]) -> PageSection:
    blocks = [
        f"<details><summary>{escape_text(run.name)}: config.yaml</summary>"
        f"<pre>{escape_text(run.config_text)}</pre></details>\n"
        for run in runs
        if run.config_text
    ]
    return PageSection("configuration", "Configuration", "".join(blocks))
