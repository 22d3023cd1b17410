"""Write one self-contained HTML page about one run or several. It opens from a file and loads nothing else.

The content-security policy allows only the page's own script, by its hash. Model output cannot run, even if it were not
escaped. A section whose input is missing is left out.
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
from purld.errors import UserError
from purld.report.answer_browser import BrowserData, answer_browser
from purld.report.changes import changes_section
from purld.report.cost import cost_section
from purld.report.figures import draw_figures
from purld.report.headline import Headline, Tone, write_headline
from purld.report.live import LiveStatus, health_section, live_headline
from purld.report.markup import PageSection, capitalised, escape_text, figure_grid
from purld.report.probe import probe_section
from purld.report.run_data import RunData, read_run
from purld.report.sensitivity import sensitivity_section
from purld.report.tables import results_section
from purld.runs.files import atomic_write, check_new_file
from purld.runs.open import open_run
from purld.runs.run_dir import RunDir

LIVE_MARK = '<meta name="purld-live" content="yes">'
_MAX_FULL_RUNS = 4  # with more runs on a page, sentences are folded and only convergence is drawn


def write_report(runs: Sequence[RunDir], out: Path) -> None:
    """Write the page about the given runs to `out`.

    Raises:
        UserError: a file of a run is damaged.
    """
    page = _page(_with_distinct_names([read_run(run) for run in runs]))
    with atomic_write(out) as handle:
        handle.write(page)


def report_runs(run_paths: Sequence[Path], out: Path | None) -> Path:
    """Write one report page about the given runs; return its path.

    Args:
        run_paths: run directories.
        out: where to write; None for the directory of a single run, or the working directory for several.

    Raises:
        UserError: a path is not a run directory, a file of a run is damaged, or `out` is a folder.
    """
    runs = [open_run(path)[0] for path in run_paths]
    for run in runs:
        _check_logs(run)
    if out is not None:
        check_new_file(out)
    target = out or (runs[0].report if len(runs) == 1 else Path(runs[0].report.name))
    write_report(runs, target)
    return target


def _check_logs(run: RunDir) -> None:
    """Check the logs of a training stage that is under way."""
    if not run.begun_stages() & {"sft", "align"} - run.finished_stages().keys():
        return
    from purld.training.checkpoints import find_log_damage  # which imports torch

    if problem := find_log_damage(run):
        raise UserError(f"{problem}; continue the run, which goes back to a step before the damage.")


def write_live_page(run: RunData, status: LiveStatus, out: Path) -> None:
    """Write the page about a run that is going on: what it has so far, its health, and when to load it again."""
    page = _page([run], status)
    with atomic_write(out) as handle:
        handle.write(page)


def _with_distinct_names(runs: Sequence[RunData]) -> list[RunData]:
    """Return the runs, with a number added to names that occur more than once."""
    counts = Counter(run.name for run in runs)
    seen: Counter[str] = Counter()
    named = []
    for run in runs:
        seen[run.name] += 1
        named.append(replace(run, name=f"{run.name} ({seen[run.name]})") if counts[run.name] > 1 else run)
    return named


def _page(runs: Sequence[RunData], live: LiveStatus | None = None) -> str:
    data = answer_browser(runs)
    script, style = _read_asset("browser.js"), _read_asset("page.css")
    if live is not None:
        script += _read_asset("live.js")
    training = _convergence_sections(runs) if len(runs) > _MAX_FULL_RUNS else _training_sections(runs)
    changes = changes_section(runs) if len(runs) <= _MAX_FULL_RUNS else PageSection("changes", "", "")
    numbers = [sensitivity_section(runs), changes, results_section(runs), probe_section(runs)]
    candidates = [*numbers, *training, cost_section(runs), _browser_section(data, live), _config_section(runs)]
    if live is not None:
        candidates.insert(0, health_section(live.lights))
    sections = [section for section in candidates if section.body]
    names = ", ".join(run.name for run in runs)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_security_policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
{_reloading(live)}<title>{escape_text(names)} · purld report</title>
<style>
{style}</style>
</head>
<body>
{_header(runs, sections, live)}
<main>
{"".join(section.to_html() for section in sections)}</main>
<script type="application/json" id="data">{data.json}</script>
<script>{script}</script>
</body>
</html>
"""


def _reloading(live: LiveStatus | None) -> str:
    """Return the mark of a live page, which without scripts loads itself again by itself."""
    if live is None:
        return ""
    refresh = f'<noscript><meta http-equiv="refresh" content="{live.every:.0f}"></noscript>\n' if live.every else ""
    return f"{LIVE_MARK}\n{refresh}"


def _security_policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def _read_asset(name: str) -> str:
    return files("purld.report").joinpath("assets", name).read_text(encoding="utf-8")


def _header(runs: Sequence[RunData], sections: Sequence[PageSection], live: LiveStatus | None) -> str:
    headlines = [(run, write_headline(run)) for run in runs]
    if live is not None:
        lines = f"{live_headline(live)}{_facts(runs[0])}"
    elif len(headlines) == 1:
        run, sentence = headlines[0]
        lines = f"{_verdict(sentence)}{_warnings(run)}{_facts(run)}"
    else:
        each = "".join(
            f'<p class="verdict {s.tone}"><b>{escape_text(run.name)}:</b> {escape_text(s.text)}</p>'
            for run, s in headlines
        )
        if len(runs) > _MAX_FULL_RUNS:
            each = f"<details><summary>Each run in a sentence</summary>{each}</details>"
        lines = f'<h1 class="verdict">{_tally(headlines)}</h1>{each}'
    links = "\n".join(section.to_link() for section in sections)
    brand = f'<p class="brand">purld <span>{"report" if live is None else "live"}</span></p>'
    return f'<header>\n{brand}\n{lines}\n<nav aria-label="Sections">\n{links}\n</nav>\n</header>'


def _verdict(sentence: Headline) -> str:
    """Return the headline of a single run: the claim as a sentence, and in smaller print the numbers."""
    claim, numbers = escape_text(sentence.claim.rstrip(".")), escape_text(capitalised(sentence.numbers))
    below = f' <span class="numbers">{numbers}</span>' if numbers else ""
    return f'<h1 class="verdict {sentence.tone}">{claim}.{below}</h1>'


def _warnings(run: RunData) -> str:
    """Return what puts the result in doubt, as a list under the headline."""
    items = "".join(f"<li>{escape_text(capitalised(warning))}</li>" for warning in run.results.get("warnings", []))
    return f'<ul class="warnings">{items}</ul>' if items else ""


def _tally(headlines: Sequence[tuple[RunData, Headline]]) -> str:
    """Return a sentence that counts the runs by the outcome against the model that each started from."""
    words: dict[Tone, str] = {
        "better": "better than the model it started from",
        "worse": "worse than the model it started from",
        "mixed": "better sampled and worse greedy than the model it started from, or the other way round",
        "open": "not told apart from the model it started from",
        "none": "without a comparison",
    }
    counts = Counter(sentence.tone for _, sentence in headlines)
    outcomes = ", ".join(f"{counts[tone]} {word}" for tone, word in words.items() if counts[tone])
    return f"{len(headlines)} runs side by side: {outcomes}."


def _facts(run: RunData) -> str:
    """Return the run's student, teacher, method, opponent, judge and seed as a list."""
    student, teacher = run.config.get("student", {}), run.config.get("teacher", {})
    facts = {
        "Run": run.name,
        "Student": _short_path(student.get("model")),
        "Teacher": teacher.get("model") or teacher.get("path"),
        "Method": model_title(run.method) if run.method else None,
        **_opponent_and_judge(run),
        "Seed": run.results.get("seed", run.config.get("seed")),
    }
    items = (f"<div><dt>{name}</dt><dd>{escape_text(v)}</dd></div>" for name, v in facts.items() if v is not None)
    return f'<dl class="facts">{"".join(items)}</dl>'


def _short_path(model: str | None) -> str | None:
    """Return a model's name, or the end of the path of its folder; the whole path is in the configuration."""
    parts = Path(model).parts if model else ()
    return "/".join(("…", *parts[-2:])) if len(parts) > 3 else model


def _opponent_and_judge(run: RunData) -> dict[str, str | None]:
    """Return the opponent and the judge; empty if the answers were not judged."""
    settings = run.config.get("evaluate") or {}
    judge, opponent = settings.get("judge"), settings.get("opponent")
    if not judge or not opponent:
        return {}
    return {"Opponent": opponent.get("path", "the teacher"), "Judge": judge.get("model") or judge.get("path")}


def _training_sections(runs: Sequence[RunData]) -> list[PageSection]:
    """Return all training figures, one section per run."""
    headings = ["Training"] if len(runs) == 1 else [f"Training: {run.name}" for run in runs]
    return [
        PageSection(f"training-{index}", heading, figure_grid(draw_figures(run, prefix=f"run{index}")))
        for index, (run, heading) in enumerate(zip(runs, headings, strict=True))
    ]


def _convergence_sections(runs: Sequence[RunData]) -> list[PageSection]:
    """Return one section with the convergence of every run. It keeps a page of many runs small."""
    figures = [
        replace(figure, heading=f"{run.name}: {figure.heading.lower()}")
        for index, run in enumerate(runs)
        for figure in draw_figures(run, prefix=f"run{index}", whole=False)
    ]
    return [PageSection("training", "Training", figure_grid(figures))]


def _browser_section(data: BrowserData, live: LiveStatus | None) -> PageSection:
    left_out = (
        f'<p class="note">This page shows the first {data.shown:,} of {data.total:,} prompts, to stay small; '
        "the run directory has all of them under generations/.</p>\n"
        if data.shown < data.total
        else ""
    )
    if data.images_left_out:
        left_out += (
            f'<p class="note">{data.images_left_out:,} images are left out to keep this page small; '
            "they are under generations/images/ in the run directory.</p>\n"
        )
    container = '<div id="browser"><noscript>The browser of prompts and answers needs JavaScript.</noscript></div>\n'
    heading = "Prompts and answers" if live is None or live.current != "align" else "The newest groups"
    return PageSection("answers", heading, left_out + container if data.total else "")


def _config_section(runs: Sequence[RunData]) -> PageSection:
    blocks = [
        f"<details><summary>{escape_text(run.name)}: config.yaml</summary>"
        f"<pre>{escape_text(run.config_text)}</pre></details>\n"
        for run in runs
        if run.config_text
    ]
    return PageSection("configuration", "Configuration", "".join(blocks))
