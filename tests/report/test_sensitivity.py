"""Test which figures a set of runs makes, and what they draw."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from synthetic import Build, results

from purld.report.page import write_report
from purld.report.run_data import RunData, read_run
from purld.report.sensitivity import _Point, draw_sensitivity, flatten_config, sensitivity_figures
from purld.runs.files import write_json


@pytest.fixture
def swept(build: Build) -> Any:
    """Return a function that writes a run per combination of `align` values; accuracy falls with beta."""

    def make(**axes: list[Any]) -> list[RunData]:
        runs = []
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            run = build(name=",".join(f"{k}={v}" for k, v in chosen.items()), held_out=1, groups=1, words=5)
            config = yaml.safe_load(run.config.read_text())
            config["seed"] = chosen.pop("seed", 0)
            config["align"] |= chosen
            run.config.write_text(yaml.safe_dump(config))
            written = results()
            written["models"]["ldl_grpo"]["accuracy"] = 0.8 - chosen.get("beta", 0) - 0.01 * config["seed"]
            write_json(run.results, written)
            runs.append(read_run(run))
        return runs

    return make


def test_a_grid_has_a_figure_for_each_key_and_metric(swept: Any) -> None:
    figures = sensitivity_figures(swept(tau=[0.6, 1.2], beta=[0.001, 0.01, 0.1], seed=[0, 1]))
    headings = [drawing.heading for drawing in figures]
    assert "Accuracy against align.tau" in headings
    assert "Win rate against align.beta" in headings
    assert len(headings) == 8  # two keys and four metrics; the seed is not a key
    ids = [
        e.get("id") for d in figures for e in ET.fromstring(d.svg.replace("xlink:href", "href")).iter() if e.get("id")
    ]
    assert len(ids) == len(set(ids))


def test_runs_that_differ_in_no_number_are_no_sweep(swept: Any) -> None:
    assert sensitivity_figures(swept(seed=[0, 1])) == []
    assert sensitivity_figures(swept(q=["ratio", "likelihood"])) == []
    assert sensitivity_figures([]) == []


def test_runs_that_differ_in_two_keys_at_once_say_nothing_about_either(swept: Any) -> None:
    low, _, _, high = swept(tau=[0.6, 1.2], beta=[0.001, 0.1])
    assert sensitivity_figures([low, high]) == []


def test_lists_are_settings_like_any_other(swept: Any) -> None:
    """What an adapter targets is a list; runs that differ in it are two lines, and it has no axis of its own."""
    runs = swept(target_modules=[["q_proj"], ["v_proj"], "all-linear"], tau=[0.6, 1.2])
    headings = [drawing.heading for drawing in sensitivity_figures(runs)]
    assert "Accuracy against align.tau" in headings and not any("target_modules" in heading for heading in headings)
    assert flatten_config(runs[0])["align.target_modules"] == '["q_proj"]'


def test_where_things_lie_is_no_setting(swept: Any) -> None:
    assert "teacher.base_url" not in flatten_config(swept(tau=[1.0])[0])
    assert flatten_config(swept(tau=[1.0])[0])["align.tau"] == 1.0


def test_a_line_joins_the_means_over_seeds(swept: Any) -> None:
    points = [_Point(x, (("align.tau", 0.6),), y) for x, y in [(0.001, 0.8), (0.001, 0.7), (0.1, 0.5), (0.1, 0.3)]]
    axes = draw_sensitivity(points, "align.beta", "accuracy", 0.6).axes[0]
    assert axes.get_xscale() == "log"
    level, dots, line = axes.lines
    assert list(level.get_ydata()) == [0.6, 0.6]
    assert len(dots.get_xdata()) == 4
    assert list(line.get_xdata()) == [0.001, 0.1]
    assert list(line.get_ydata()) == pytest.approx([0.75, 0.4])


def test_other_settings_are_lines_with_names(swept: Any) -> None:
    points = [_Point(x, (("align.q", q),), 0.5) for x in (1.0, 2.0) for q in ("ratio", "mean")]
    axes = draw_sensitivity(points, "align.tau", "accuracy", None).axes[0]
    assert axes.get_xscale() == "linear"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["q=mean", "q=ratio"]


def test_a_page_of_many_runs_stays_small(build: Build, swept: Any, tmp_path: Path) -> None:
    from purld.runs.run_dir import RunDir

    runs = swept(tau=[0.6, 0.9, 1.2], beta=[0.001, 0.01])
    page = tmp_path / "report.html"
    write_report([RunDir(tmp_path / run.name) for run in runs], page)
    text = page.read_text()
    assert '<section id="sensitivity">' in text
    assert text.count("two-stage convergence</h3>") == 6
    assert text.count('<section id="training') == 1
    assert "6 runs side by side: 6 better than the model it started from." in text
    assert "Gradient norm" not in text
    assert page.stat().st_size < 1_500_000
