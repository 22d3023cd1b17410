"""Test the live page as a file: what it says of a run that is going on, and how it loads itself again."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

import pytest
from synthetic import Build

from purld.report.health import Light
from purld.report.live import LiveStatus
from purld.report.page import LIVE_MARK, write_live_page
from purld.report.run_data import read_run
from purld.runs.files import append_rows, read_rows
from purld.runs.run_dir import RunDir

STATUS = LiveStatus(
    stages=[("anchors", "done"), ("sft", "done"), ("align", "running"), ("evaluate", "to do")],
    running=True,
    current="align",
    details=("step 34 of 120, objective 0.4", "began 3 min ago, about 12 min left"),
    share=34 / 120,
    lights=[Light("Entropy of D", "amber", "0.995 of ln K", "the labels hardly <tell> the candidates apart")],
    written=1_700_000_000.0,
    every=15.0,
)


def page_of(run: RunDir, status: LiveStatus = STATUS) -> str:
    write_live_page(read_run(run, newest=4), status, run.report)
    return run.report.read_text(encoding="utf-8")


def test_it_says_where_the_run_stands_and_how_it_is(build: Build) -> None:
    run = build(held_out=0, logged=False)
    run.results.unlink()
    page = page_of(run)
    assert "Stage II: alignment." in page
    assert "Step 34 of 120, objective 0.4. Began 3 min ago, about 12 min left." in page
    assert '<i style="width:28.3%">' in page
    assert '<li class="done">Stage I</li><li class="now">Stage II</li><li class="next">Evaluation</li>' in page
    assert '<li class="amber"><b>Entropy of D</b> <span class="state">amber</span>' in page
    assert "hardly &lt;tell&gt; the candidates" in page
    assert "The newest groups" in page
    assert re.findall('<section id="([^"]+)"', page)[0] == "health"


def test_it_loads_itself_again_from_the_file_alone(build: Build) -> None:
    run = build(held_out=0, logged=False)
    page = page_of(run)
    assert LIVE_MARK in page and 'data-every="15"' in page
    assert '<noscript><meta http-equiv="refresh" content="15"></noscript>' in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert policy and script and "location.reload()" in script[1]
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_page_that_nobody_writes_any_more_does_not_load_itself_again(build: Build) -> None:
    page = page_of(build(held_out=0, logged=False), replace(STATUS, every=None, running=False))
    assert 'http-equiv="refresh"' not in page and 'data-every="0"' in page
    assert "Nothing works on it now." in page


@pytest.mark.parametrize(
    ("stages", "claim"),
    [
        ([("anchors", "done"), ("sft", "to do")], "Between two stages."),
        ([("anchors", "done")], "All stages are finished"),
    ],
)
def test_between_stages_it_says_so(build: Build, stages: list[tuple[str, str]], claim: str) -> None:
    status = replace(STATUS, stages=stages, current=None, running=None, details=(), share=None, lights=())
    page = page_of(build(held_out=0, logged=False), status)
    assert claim in page
    assert '<section id="health"' not in page


def test_the_newest_groups_come_first_one_per_prompt(build: Build) -> None:
    run = build(held_out=0, groups=6, logged=False)
    rows = read_rows(run.groups)
    append_rows(run.groups, [rows[4] | {"step": 99}])
    groups = read_run(run, newest=4).groups
    assert [(group["prompt_id"], group["step"]) for group in groups] == [
        (rows[4]["prompt_id"], 99), (rows[5]["prompt_id"], 6), (rows[3]["prompt_id"], 4),
    ]  # fmt: skip


def test_a_run_that_is_being_written_can_be_read(build: Build) -> None:
    """The manifest knows an older state of the log, whose last row is half written."""
    run = build(held_out=0, groups=3)
    run.begin("sft")
    run.finish("sft", 1.0)
    append_rows(run.metrics, [{"stage": "align", "step": 121, "objective": 0.1}])
    for path in (run.metrics, run.groups):
        with path.open("ab") as handle:
            handle.write(b'{"stage": "align", "step": 122, "obj')
    seen = read_run(RunDir(run.path), newest=4)
    assert seen.metrics[-1]["step"] == 121
    assert len(seen.groups) == 3
