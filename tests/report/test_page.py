"""Test the page as a file: self-contained, honest about missing input, safe without its script."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import Build

from purld.errors import UserError
from purld.report.figures import PANELS
from purld.report.page import write_report
from purld.runs.files import read_json, write_json
from purld.runs.run_dir import RunDir


class Elements(HTMLParser):
    """A parser that lists every start tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def written(*runs: RunDir) -> str:
    write_report(runs, runs[0].report)
    return runs[0].report.read_text(encoding="utf-8")


def sections(page: str) -> list[str | None]:
    return [attributes["id"] for tag, attributes in Elements(page).tags if tag == "section"]


def test_a_finished_run_has_every_section(build: Build) -> None:
    page = written(build())
    assert sections(page) == ["changes", "results", "training-0", "spend", "answers", "configuration"]
    assert '<h1 class="verdict better">LDL-GRPO is better than SFT sampled, and cannot be told apart from it' in page
    assert '<span class="numbers">Sampled, 74.5% right answers against 68.3%' in page
    assert "<b>74.5%</b> <small>70.4 – 78.3</small>" in page
    assert "<dd>184,220</dd><dt>tokens in</dt>" in page
    assert "7,680 candidates" in page  # 120 steps of 8 prompts with 8 candidates
    assert "<dt>Opponent</dt><dd>the teacher</dd>" in page and "<dt>Judge</dt><dd>our-judge</dd>" in page


def test_nothing_on_the_page_points_elsewhere(build: Build) -> None:
    for tag, attributes in Elements(written(build())).tags:
        assert tag not in {"link", "img", "iframe", "object", "base", "form"}
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)


def test_the_policy_allows_the_pages_own_script_alone(build: Build) -> None:
    page = written(build(logged=False))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert policy and script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1]


def test_a_run_that_has_only_begun_has_a_page(build: Build, tmp_path: Path) -> None:
    empty = RunDir(tmp_path / "empty")
    page = written(empty)
    assert sections(page) == []
    assert "has not been evaluated yet" in page


@pytest.mark.parametrize(
    ("missing", "section"),
    [("metrics", "training-0"), ("config", "configuration"), ("results", "results")],
)
def test_a_missing_file_costs_its_section_only(build: Build, missing: str, section: str) -> None:
    run = build(logged=missing == "metrics")
    before = sections(written(run))
    getattr(run, missing).unlink()
    after = sections(written(run))
    lost = {section, "spend"} if missing == "results" and "spend" not in after else {section}
    assert [s for s in before if s not in lost] == after


def test_what_was_not_measured_is_absent_and_never_zero(build: Build) -> None:
    run = build(logged=False)
    results = read_json(run.results)
    for model in results["models"].values():
        for key in ("win_rate", "win_rate_ci", "lc_win_rate", "lc_win_rate_ci", "unjudged", "flip_rate"):
            del model[key]
    del results["models"]["base"]["accuracy"], results["models"]["base"]["accuracy_ci"]
    del results["teacher"]["cost"]
    write_json(run.results, results)
    page = written(run)
    assert "Bars are 95% intervals" in page
    assert "Win rate" not in page
    assert "Flips with order" not in page
    assert "<dt>cost</dt>" not in page
    assert "<b>0.0%</b>" not in page
    assert '<th scope="row">Base</th><td data-label="Accuracy" class="absent">–</td>' in page


def test_without_a_rate_there_is_no_word_of_bars(build: Build) -> None:
    run = build(held_out=1, logged=False)
    models = {"base": {"n": 8, "mean_tokens": 8.0}, "ldl_grpo": {"n": 8, "mean_tokens": 9.0}}
    write_json(run.results, {"method": "ldl_grpo", "models": models})
    page = written(run)
    assert "Mean tokens" in page and "Bars are 95% intervals" not in page


def test_names_and_configuration_are_text(build: Build) -> None:
    run = build(name="<b>run & co", logged=False)
    run.config.write_text("student: {model: '<script>alert(1)</script> \u202edesrever'}\n", encoding="utf-8")
    page = written(run)
    assert "<b>run" not in page
    assert "&lt;b&gt;run &amp; co" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ⟨U+202E⟩desrever" in page
    assert page.count("<script") == 2


def test_several_runs_side_by_side(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("purld.report.figures.PANELS", PANELS[:1])  # the others take seconds and are no different
    first, second = build("a/clinic"), build("b/clinic", seed=1)
    third = build("other")
    page = written(first, second, third)
    assert "3 runs side by side" in page
    for name in ("clinic (1)", "clinic (2)", "other"):
        assert f'<th scope="rowgroup" rowspan="1">{name}</th>' in page or f'rowspan="3">{name}</th>' in page
    assert [s for s in sections(page) if s and s.startswith("training")] == ["training-0", "training-1", "training-2"]
    ids = [attributes["id"] for _, attributes in Elements(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_model_that_runs_share_is_shown_once(build: Build) -> None:
    """Of two runs that share Stage I, the first shows base and SFT, the second only its own final model."""
    first, second = build("first", logged=False), build("second", logged=False)
    results = read_json(second.results)
    results["models"]["ldl_grpo"]["accuracy"] = 0.512
    write_json(second.results, results)
    page = written(first, second)
    rates = page[page.index('aria-label="Models and metrics"') : page.index("On the same prompts")]
    assert rates.count('<th scope="row">SFT</th>') == rates.count('<th scope="row">Base</th>') == 1
    assert rates.count('<th scope="row">LDL-GRPO</th>') == 2
    assert '<th scope="rowgroup" rowspan="3">first</th>' in rates
    assert '<th scope="rowgroup" rowspan="1">second</th>' in rates
    assert "is not repeated" in page and "is not repeated" not in written(first)


def test_a_difference_has_a_tone_where_its_interval_excludes_zero_and_its_p(build: Build) -> None:
    run = build(logged=False)
    results = read_json(run.results)
    results["difference"]["ldl_grpo - sft"]["greedy_accuracy_p"] = 0.118
    write_json(run.results, results)
    page = written(run)
    assert '<b class="better">+6.2</b> <small>+3.1 to +9.5</small>' in page
    assert '<b class="open">+2.3</b> <small>−0.7 to +5.3; p = 0.12</small>' in page


def test_every_cell_is_named_for_a_phone(build: Build) -> None:
    """A phone shows a row as a card, where the heading of a cell's column stands beside the cell."""
    page = written(build(logged=False))
    cells = [attributes for tag, attributes in Elements(page).tags if tag == "td"]
    assert cells and all("data-label" in attributes for attributes in cells)
    rates = page[page.index('aria-label="Models and metrics"') : page.index("On the same prompts")]
    names = re.findall('data-label="([^"]+)"', rates)
    assert names == ["Accuracy", "Accuracy, greedy", "Win rate", "Win rate, length-controlled"] * 3
    differences = page[page.index('aria-label="Paired differences"') : page.index("Bars are 95% intervals")]
    assert re.findall('data-label="([^"]*)"', differences) == ["Percentage points", ""] * 3


def test_a_long_path_of_the_student_is_cut_to_its_end(build: Build) -> None:
    run = build(logged=False)
    run.config.write_text("student: {model: /a/long/path/to/clinic-1b}\n", encoding="utf-8")
    assert "<dt>Student</dt><dd>…/to/clinic-1b</dd>" in written(run)
    run.config.write_text("student: {model: org/clinic-1b}\n", encoding="utf-8")
    assert "<dt>Student</dt><dd>org/clinic-1b</dd>" in written(run)


def test_equal_runs_make_equal_pages(build: Build) -> None:
    run = build(logged=False)
    assert written(run) == written(run)


def test_a_damaged_file_is_named(build: Build) -> None:
    run = build()
    run.metrics.write_text('{"stage": "sft"\n{}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        written(run)
