"""Test the lights of a running Stage II: every limit of the table, on both sides."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import synthetic_run

from purld.report.health import GOLD_WHY, RULES, GoldAuc, Light, health_lights
from purld.report.run_data import RunData, read_run
from purld.training.align import AlignFacts

LN_K = math.log(8)  # the synthetic run draws 8 candidates for each of 8 prompts, for 120 steps


@pytest.fixture(scope="module")
def unlogged(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(synthetic_run(tmp_path_factory.mktemp("health") / "run", held_out=1, groups=1, logged=False))


@pytest.fixture
def lights(unlogged: RunData) -> Any:
    """Return a function that gives the lights, by name, of a run that logged the given columns."""

    def judge(gold: GoldAuc | None = None, **columns: list[float | None]) -> dict[str, Light]:
        rows = [
            {"stage": "align", "step": n + 1, "objective": 0.5}
            | {name: values[n] for name, values in columns.items() if values[n] is not None}
            for n in range(max(map(len, columns.values())))
        ]
        return {light.name: light for light in health_lights(replace(unlogged, metrics=rows), gold)}

    return judge


@pytest.mark.parametrize(
    ("name", "columns", "colour"),
    [
        ("Entropy of D", {"entropy_labels": [0.8 * LN_K] * 5}, "green"),
        ("Entropy of D", {"entropy_labels": [0.995 * LN_K] * 5}, "amber"),
        ("Entropy of D", {"entropy_labels": [0.9999 * LN_K] * 5}, "red"),
        ("Entropy of D", {"entropy_labels": [math.log(5)] * 5, "label_uniformity": [1.0] * 5}, "red"),  # 5 of 8 scored
        ("Entropy of D", {"entropy_labels": [0.1 * LN_K] * 5}, "amber"),
        ("Entropy of D", {"entropy_labels": [0.01 * LN_K] * 5}, "red"),
        ("KL from SFT", {"kl": [1.0] * 5, "length": [20.0] * 5}, "green"),
        ("KL from SFT", {"kl": [4.0] * 5, "length": [20.0] * 5}, "amber"),
        ("KL from SFT", {"kl": [25.0] * 5, "length": [12.0] * 5}, "red"),
        ("Movement", {"kl": [0.0] * 29}, "grey"),  # not a quarter of 120 steps
        ("Movement", {"kl": [0.0] * 30}, "amber"),
        ("Movement", {"kl": [0.0] * 25 + [-0.02] * 5}, "green"),
        ("Gain", {"gain": [0.02] * 9, "score_spread": [0.2] * 9}, "grey"),
        ("Gain", {"gain": [-0.5] * 30 + [0.02] * 10, "score_spread": [0.2] * 40}, "green"),
        ("Gain", {"gain": [-0.01] * 10, "score_spread": [0.2] * 10}, "amber"),
        ("Gain", {"gain": [-0.05] * 10, "score_spread": [0.2] * 10}, "red"),
        ("Gain", {"gain": [0.0] * 10, "score_spread": [0.0] * 10}, "grey"),  # no score differs
        ("Answer length", {"length": [20.0] * 9}, "grey"),
        ("Answer length", {"length": [20.0] * 5 + [22.0] * 5}, "green"),
        ("Answer length", {"length": [20.0] * 5 + [30.0] * 5}, "amber"),
        ("Answer length", {"length": [20.0] * 5 + [50.0] * 5}, "red"),
        ("Answer length", {"length": [20.0] * 5 + [13.0] * 5}, "amber"),
        ("Answer length", {"length": [20.0] * 5 + [8.0] * 5}, "red"),
        ("Score spread", {"score_spread": [0.2] * 5 + [0.12] * 5}, "green"),
        ("Score spread", {"score_spread": [0.2] * 5 + [0.05] * 5}, "amber"),
        ("Score spread", {"score_spread": [0.2] * 5 + [0.01] * 5}, "red"),
        ("Score spread", {"score_spread": [0.0] * 10}, "red"),
        ("Cut off", {"truncated": [0.0] * 5}, "green"),
        ("Cut off", {"truncated": [64 * 0.05] * 5}, "amber"),
        ("Cut off", {"truncated": [64 * 0.2] * 5}, "red"),
        ("Cut off", {"truncated": [3.0] * 5, "drawn": [16.0] * 5}, "red"),  # a pool smaller than a step
    ],
)
def test_a_light_has_the_colour_of_its_limits(
    lights: Any, name: str, columns: dict[str, list[float | None]], colour: str
) -> None:
    light = lights(**columns)[name]
    assert light.colour == colour
    assert light.reason


def test_the_newest_steps_count_and_what_is_not_finite_does_not(lights: Any) -> None:
    late = [0.0] * 90 + [64 * 0.2] * 10
    assert lights(truncated=late)["Cut off"].colour == "red", "the last tenth"
    assert lights(truncated=[0.0, None, math.nan, 0.0])["Cut off"].colour == "green"


def test_a_signal_that_the_method_lacks_has_no_light(lights: Any) -> None:
    assert set(lights(length=[20.0] * 3)) == {"Answer length"}


@pytest.mark.parametrize(("joins", "members"), [(False, 8), (True, 9)])
def test_entropy_is_told_against_that_of_uniform_labels_the_anchors_among_them(joins: bool, members: int) -> None:
    rows = [{"entropy_labels": 0.8 * math.log(members)}]
    assert RULES[0].measure(rows, {"candidates": 8, "anchor_in_group": joins}) == pytest.approx(0.8)


def test_before_the_first_step_there_are_no_lights(unlogged: RunData) -> None:
    assert health_lights(unlogged, GoldAuc(0.9, 0.8, 1.0, 4)) == []


@pytest.mark.parametrize(
    ("interval", "colour"), [((0.7, 0.9), "green"), ((0.4, 0.9), "amber"), ((0.1, 0.4), "red"), ((0.5, 0.9), "amber")]
)
def test_the_light_of_gold_follows_its_interval(lights: Any, interval: tuple[float, float], colour: str) -> None:
    light = lights(gold=GoldAuc(sum(interval) / 2, *interval, groups=9), kl=[0.1])["AUC against gold"]
    assert light.colour == colour


@pytest.mark.parametrize("beyond", [0.99, 1.01])
def test_the_limits_are_those_of_the_warnings_at_the_end(beyond: float) -> None:
    """A stage that ends at a light's limit warns on the side where the light is not green."""
    bounds = {rule.name: (rule.low, rule.high) for rule in RULES}
    (_, entropy), (spread, _), (movement, _) = (bounds[name] for name in ("Entropy of D", "Score spread", "Movement"))
    (_, cut) = bounds["Cut off"]
    assert entropy is not None and spread is not None and movement is not None and cut is not None
    assert entropy.red is not None and spread.red is not None and cut.red is not None
    facts = AlignFacts(
        prompts=4,
        steps=8,
        candidates=10_000,
        truncated=int(10_000 * cut.red * beyond),
        unscored=0,
        thinking=0,
        dropped_groups=0,
        sharper_than_labels=0.0,
        against_flattening="",
        label_entropy=1 - (1 - entropy.red) * beyond,
        spread_kept=spread.red * beyond,
        kl=movement.amber * beyond,
    )
    told = " ".join(facts.warnings)
    low, high = ("collapsed", "hardly moved", "stayed uniform"), ("met the limit",)
    assert all((words in told) == (beyond < 1) for words in low)
    assert all((words in told) == (beyond > 1) for words in high)


def test_the_docs_have_the_table() -> None:
    """docs/watch.md has a row per rule: its limits, and the reason for them, word for word."""
    page = (Path(__file__).parents[2] / "docs" / "watch.md").read_text(encoding="utf-8")
    rows = {cells[0]: cells[1:] for line in page.splitlines() if len(cells := re.split(r"\s*\|\s*", line)[1:-1]) == 6}
    for rule in RULES:
        unit, low, high, meaning, why = rows[rule.name]
        assert unit == rule.unit
        assert low == ("–" if rule.low is None else _cell(rule.low.amber, rule.low.red))
        assert high == ("–" if rule.high is None else _cell(rule.high.amber, rule.high.red))
        assert meaning == "; ".join(
            f"{side}: {bound.reason.split(';')[0]}"
            for side, bound in (("low", rule.low), ("high", rule.high))
            if bound is not None
        )
        assert why == rule.why
    assert GOLD_WHY in page


def _cell(amber: float, red: float | None) -> str:
    return f"{amber:g}" if red is None else f"{amber:g}, red {red:g}"


def test_agreement_that_has_no_spread_left_is_no_light(unlogged: RunData) -> None:
    """Where nearly all candidates are right, they agree alike; of other scores it is a collapse."""
    rows = [
        {"stage": "align", "step": n + 1, "objective": 0.5, "score_spread": spread}
        for n, spread in enumerate([0.4] * 5 + [0.01] * 5)
    ]
    for score, colour in (("agreement", "grey"), ("expected", "red")):
        config = {**unlogged.config, "align": {**unlogged.config["align"], "score": score}}
        lights = {light.name: light for light in health_lights(replace(unlogged, metrics=rows, config=config), None)}
        assert lights["Score spread"].colour == colour
