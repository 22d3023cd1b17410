"""Test the page in a real browser: hostile text does not run, and search, filters and keys work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import EXECUTABLE, Page
from image_factory import encode_image, make_image
from synthetic import HOSTILE, REVERSED, REVISITED, Build, picture_run, synthetic_run

from purld.data.images import read_image
from purld.records import IMAGE, Prompt
from purld.report import tables
from purld.report.health import Light
from purld.report.live import LiveStatus
from purld.report.page import write_live_page, write_report
from purld.report.run_data import read_run
from purld.runs.files import read_rows, write_json, write_rows
from purld.runs.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed")]

FILTER = "document.querySelector('.controls select')"
SEARCH = "document.querySelector('.controls input')"
LISTED = "document.querySelectorAll('.list button').length"
DETAIL = "document.querySelector('.detail').textContent"


def type_into(page: Page, control: str, event: str, value: str) -> None:
    page.run(f"{control}.value = {value!r}; {control}.dispatchEvent(new Event({event!r}))")


def open_on_all(page: Page, run: RunDir) -> None:
    """Open a report, list all prompts and choose the first."""
    page.open(run.report.resolve().as_uri())
    type_into(page, FILTER, "change", "all")
    page.run("document.querySelector('.list button').click()")


# Elements that reach out of the window, hide a part of themselves sideways, or are text outside of their drawing.
CUT_OFF = """[...document.querySelectorAll('body *')].filter((e) => {
  if (e.closest('thead, [hidden]') || !e.getClientRects().length) return false;
  const box = e.getBoundingClientRect();
  if (box.left < -0.5 || box.right > innerWidth + 0.5) return true;
  if (e.tagName === 'text') {
    const frame = e.ownerSVGElement.getBoundingClientRect();
    return box.left < frame.left - 1.5 || box.right > frame.right + 1.5
      || box.top < frame.top - 1.5 || box.bottom > frame.bottom + 1.5;
  }
  return getComputedStyle(e).overflowX !== 'visible' && e.scrollWidth > e.clientWidth + 1;
}).map((e) => `${e.tagName}.${e.className.baseVal ?? e.className}: ${e.textContent.slice(0, 60)}`)"""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run in which all model output attacks the page."""
    run = synthetic_run(tmp_path_factory.mktemp("poisoned") / "<script>window.injected=true<")
    for path, key in ((run.generations("ldl_grpo"), "text"), (run.opponent, "text"), (run.groups, "anchor")):
        write_rows(path, [row | {key: f"{HOSTILE} {REVERSED}"} for row in read_rows(path)])
    write_rows(run.groups, [row | {"candidates": [HOSTILE] * 8, "prompt": HOSTILE} for row in read_rows(run.groups)])
    write_rows(run.verdicts("sft"), [row | {"raw": HOSTILE} for row in read_rows(run.verdicts("sft"))])
    write_report([run], run.report)
    return run


@pytest.fixture(scope="module")
def page(poisoned: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(tmp_path_factory.mktemp("profile")) as page:
        open_on_all(page, poisoned)
        yield page


def test_hostile_answers_are_words_and_nothing_runs(page: Page) -> None:
    for index in (0, -1):  # a held-out answer and a group of Stage II
        page.run(f"[...document.querySelectorAll('.list button')].at({index}).click()")
        assert "<script>window.injected = true; alert(1)</script>" in page.run(DETAIL)
    page.run("document.querySelector('.list button').click()")
    shown = page.run(DETAIL)
    for mark in ("U+202E", "U+2066", "U+001B", "U+0007", "U+00AD", "U+D83D"):
        assert mark in shown
    assert "\u202e" not in shown
    assert page.run("window.injected === undefined")
    assert page.run("document.scripts.length") == 2
    assert page.run("document.images.length") == 0


def test_nothing_but_the_file_is_asked_for_and_nothing_complains(page: Page, poisoned: RunDir) -> None:
    assert page.requests == [poisoned.report.resolve().as_uri()]
    assert page.errors == []


def test_a_script_that_got_in_would_not_run(page: Page) -> None:
    """The policy allows the page's own script by its hash; any other script does not run."""
    page.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.injected = 1';"
        " document.body.append(s); s.remove(); })()"
    )
    assert page.run("window.injected === undefined")
    page.errors.clear()


def test_filter_and_search_narrow_the_list(page: Page) -> None:
    assert page.run(LISTED) == 70
    type_into(page, FILTER, "change", "held")
    assert page.run(LISTED) == 30
    type_into(page, FILTER, "change", "unscored")
    assert page.run(LISTED) == 5  # every seventh of 40 groups
    type_into(page, FILTER, "change", "all")
    type_into(page, SEARCH, "input", "CASE 7:")
    assert page.run(LISTED) == 1
    type_into(page, SEARCH, "input", "no such words")
    assert page.run(LISTED) == 0
    assert "No prompt matches" in page.run("document.querySelector('.list').textContent")
    type_into(page, SEARCH, "input", "")
    assert page.run(LISTED) == 70
    assert page.run("document.querySelector('.controls output').textContent") == "70 of 70"


def test_what_an_undecided_judge_said_is_shown(page: Page) -> None:
    type_into(page, FILTER, "change", "unjudged")
    assert page.run(LISTED) > 0
    page.run("document.querySelector('.list button').click()")
    assert "The judge said:I cannot decide between these." in page.run(DETAIL)
    type_into(page, FILTER, "change", "all")


def test_fixed_prompts_are_those_where_sft_was_wrong_and_the_method_right(page: Page, poisoned: RunDir) -> None:
    def right(model: str) -> list[bool]:
        return [row["correct"] for row in read_rows(poisoned.generations(model))]

    type_into(page, FILTER, "change", "fixed")
    expected = sum(m and not s for m, s in zip(right("ldl_grpo"), right("sft"), strict=True))
    assert page.run(LISTED) == expected > 0
    type_into(page, FILTER, "change", "all")


def test_keys_walk_the_list_and_reach_the_search(page: Page) -> None:
    page.run("document.querySelectorAll('.list button')[0].focus()")
    page.press("ArrowDown")
    page.press("ArrowDown")
    page.press("ArrowUp")
    assert page.run("document.activeElement === document.querySelectorAll('.list button')[1]")
    assert page.run("document.querySelector('.list [aria-current]') === document.activeElement")
    assert "Case 1:" in page.run(DETAIL)
    page.press("End")
    assert page.run("document.activeElement === [...document.querySelectorAll('.list button')].at(-1)")
    page.press("Home")
    assert page.run("document.activeElement === document.querySelector('.list button')")
    page.press("/")
    assert page.run(f"document.activeElement === {SEARCH}")


def test_tab_stops_once_at_the_list(page: Page) -> None:
    """A keyboard user reaches the answers without passing 70 prompts."""
    stops = "[...document.querySelectorAll('.list button')].filter((b) => b.tabIndex === 0)"
    page.run("document.querySelectorAll('.list button')[2].click()")
    assert page.run(f"{stops}.length") == 1
    assert page.run(f"{stops}[0].getAttribute('aria-current')") == "true"
    type_into(page, SEARCH, "input", "case 9:")  # the chosen prompt is not in the list
    assert page.run(f"{stops}.length") == 1
    type_into(page, SEARCH, "input", "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_is_cut_off_on_a_desk_or_a_phone(build: Build, tmp_path: Path, width: int, scheme: str) -> None:
    run = build()
    write_report([run], run.report)
    with Page(tmp_path / "profile") as page:
        page.prefer(scheme)
        page.resize(width, 844)
        page.open(run.report.as_uri())
        page.run("for (const d of document.querySelectorAll('details')) d.open = true")
        assert page.run(CUT_OFF) == []
        assert page.run("document.documentElement.scrollWidth") <= width
        ground = page.run("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(20, 22, 26)") == (scheme == "dark")
        assert page.errors == []


def test_tables_of_several_runs_with_every_measure_fit_a_desk(tmp_path: Path) -> None:
    runs = []
    for name, method in (
        ("counting-anchorrank-dpo-seed-0", "anchorrank_dpo"),
        ("judged-teacher-judge", "teacher_judge_grpo"),
    ):
        run = synthetic_run(tmp_path / name, held_out=3, groups=3, logged=False)
        results = json.loads(run.results.read_text().replace("ldl_grpo", method))
        for metrics in results["models"].values():
            metrics.update({key: metrics.get(key, 0.5123) for key in (*tables._RATES, *tables._MEASURES)})
            metrics.update({f"{key}_ci": [0.4123, 0.6123] for key in tables._RATES})
        write_json(run.results, results)
        runs.append(run)
    write_report(runs, tmp_path / "page.html")
    with Page(tmp_path / "profile") as page:
        page.resize(1400, 844)
        page.open((tmp_path / "page.html").as_uri())
        headings = page.run("[...document.querySelectorAll('.scroll thead')].map((e) => e.textContent).join()")
        assert all(title in headings for title in (*tables._RATES.values(), *tables._MEASURES.values()))
        assert page.run(CUT_OFF) == []


def test_the_page_opens_where_sft_and_the_aligned_model_differ(build: Build, tmp_path: Path) -> None:
    run = build(groups=3, logged=False)

    def right(model: str) -> list[int]:
        drawn, greedy = (read_rows(run.generations(name)) for name in (model, f"{model}.greedy"))
        return [a["correct"] + b["correct"] for a, b in zip(drawn, greedy, strict=True)]

    write_report([run], run.report)
    changes = [after - before for before, after in zip(right("sft"), right("ldl_grpo"), strict=True)]
    with Page(tmp_path / "profile") as page:
        page.open(run.report.as_uri())
        assert page.run(f"{FILTER}.selectedOptions[0].textContent").startswith("SFT and LDL-GRPO differ (")
        assert page.run(LISTED) == sum(change != 0 for change in changes) > 0
        marks = page.run("[...document.querySelectorAll('.list .chips')].map((c) => c.firstChild.textContent)")
        # "0/2 → 2/2 right"; with two answers, a change of both comes before a change of the first, and that before one
        # of the second.
        shown = [abs(int(mark[6]) - int(mark[0])) for mark in marks]
        assert shown[0] == max(map(abs, changes)) and shown.count(2) == sum(abs(change) == 2 for change in changes)
        assert page.run("[...document.querySelectorAll('.detail .answer .chip')].map((c) => c.textContent)")[:1]
        assert page.run("document.querySelector('.list button').hasAttribute('aria-current')")


def test_without_gold_and_judge_it_opens_where_the_words_differ(build: Build, tmp_path: Path) -> None:
    run = build(held_out=3, groups=0, logged=False)
    for model in ("base", "sft", "ldl_grpo"):
        run.verdicts(model).unlink()
        run.generations(f"{model}.greedy").unlink()
        rows = read_rows(run.generations(model))
        texts = ["same", "same", model]
        write_rows(run.generations(model), [
            {k: v for k, v in row.items() if k != "correct"} | {"text": t} for row, t in zip(rows, texts, strict=True)
        ])  # fmt: skip
    write_report([run], run.report)
    with Page(tmp_path / "profile") as page:
        page.open(run.report.as_uri())
        assert page.run(LISTED) == 1
        assert "Case 2:" in page.run(DETAIL)


def test_many_prompts_stay_small_and_quick(build: Build, tmp_path: Path) -> None:
    """500 prompts with 8 candidates of about 900 characters each, and 100 held-out ones."""
    run = build(held_out=100, groups=500, words=170, logged=False)
    write_report([run], run.report)
    assert 4_000_000 < run.report.stat().st_size < 10_000_000
    with Page(tmp_path / "profile") as page:
        open_on_all(page, run)
        assert page.run(LISTED) == 600
        # Only one prompt is laid out in full, next to a list of short lines; more would make the page slow.
        assert page.run("document.querySelectorAll('main section#answers *').length") < 600 * 10
        assert page.run("document.querySelectorAll('.candidate').length") <= 8
        type_into(page, SEARCH, "input", "case 512:")
        assert page.run(LISTED) == 1
        assert page.errors == []


PICTURES = "[...document.querySelectorAll('.detail .images img')]"


def loaded(page: Page) -> list[list[int]]:
    """Return the natural sizes of the chosen prompt's images, once they are decoded."""
    page.run(f"Promise.all({PICTURES}.map((i) => i.decode())).then(() => 0)", wait=True)
    sizes: list[list[int]] = page.run(f"{PICTURES}.map((i) => [i.naturalWidth, i.naturalHeight])")
    return sizes


def test_the_pictures_of_a_prompt_are_shown_where_it_asks_about_them(build: Build, tmp_path: Path) -> None:
    run = build(held_out=2, groups=2, logged=False)
    photo, art = (read_image(encode_image(make_image(*size)), tmp_path) for size in ((900, 600), (32, 24)))
    picture_run(
        run,
        {
            f"{0:016x}": Prompt.from_text(f"{IMAGE}\nWhat is on the ward? {HOSTILE}", images=(photo,)),
            f"{1:016x}": Prompt.from_text(f"Is {IMAGE} like {IMAGE}?", images=(art, photo)),
            f"{2:016x}": Prompt.from_text(f"{IMAGE}Which dose?", images=(art,)),
        },
    )
    write_report([run], run.report)
    assert run.report.read_text().count("data:image/") == 2, "each picture is in the page once"
    with Page(tmp_path / "profile") as page:
        open_on_all(page, run)
        assert loaded(page) == [[360, 240]]
        assert page.run("document.querySelector('.question').textContent").startswith("What is on the ward? <script>")
        assert page.run(f"{PICTURES}[0].className") == ""
        page.run("document.querySelectorAll('.list button')[1].click()")
        assert loaded(page) == [[32, 24], [360, 240]]
        assert page.run("document.querySelector('.question').textContent") == "Is image 1 like image 2?"
        assert page.run(f"{PICTURES}.map((i) => i.alt)") == ["image 1 of the prompt", "image 2 of the prompt"]
        assert page.run(f"getComputedStyle({PICTURES}[0]).imageRendering") == "pixelated"
        assert page.run(f"getComputedStyle({PICTURES}[1]).imageRendering") == "auto"
        page.run("document.querySelectorAll('.list button')[2].click()")
        assert loaded(page) == [[32, 24]]
        assert "Which dose?" in page.run(DETAIL)
        page.run("document.querySelectorAll('.list button')[3].click()")  # a prompt without pictures
        assert page.run(f"{PICTURES}.length") == 0
        assert page.run("document.querySelectorAll('.list button img').length") == 3
        assert "\ufffc" not in page.run("document.body.textContent.replace(/.*\"entries\".*/, '')")
        page.resize(390, 800)
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.requests == [run.report.as_uri()] + [u for u in page.requests if u.startswith("data:image/")]
        assert page.errors == []


def test_a_mark_that_a_model_wrote_is_named_and_no_picture(build: Build, tmp_path: Path) -> None:
    run = build(held_out=1, groups=0, logged=False)
    path = run.generations("sft")
    write_rows(path, [row | {"text": f"Here: {IMAGE}"} for row in read_rows(path)])
    write_report([run], run.report)
    with Page(tmp_path / "profile") as page:
        open_on_all(page, run)
        assert "Here: U+FFFC" in page.run(DETAIL)
        assert page.run("document.images.length") == 0


def test_a_linked_prompt_is_open(build: Build, tmp_path: Path) -> None:
    run = build(held_out=3, groups=3, logged=False)
    write_report([run], run.report)
    with Page(tmp_path / "profile") as page:
        page.open(f"{run.report.as_uri()}#prompt-0-{4:016x}")
        assert "Case 4:" in page.run(DETAIL)


def test_q_stands_before_and_after_where_it_was_measured_again(build: Build, tmp_path: Path) -> None:
    """Groups measured twice show q before and after; other groups show one q."""
    run = build(held_out=0, groups=REVISITED + 1, logged=False)
    write_report([run], run.report)
    with Page(tmp_path / "profile") as page:
        open_on_all(page, run)
        shown = page.run(DETAIL)
        assert "KL(D‖q) 0.310 before, 0.103 after" in shown
        assert shown.count("q before") == 1 + 8 and shown.count("q after") == 1 + 8  # the note, and each candidate
        assert f"q before and after ({REVISITED})" in page.run("document.querySelector('.controls select').textContent")
        page.run("[...document.querySelectorAll('.list button')].at(-1).click()")
        shown = page.run(DETAIL)
        assert "before" not in shown and "after" not in shown and "KL(D" not in shown
        assert page.errors == []


def test_a_group_that_no_update_learned_from_says_so(build: Build, tmp_path: Path) -> None:
    run = build(held_out=0, groups=2)
    absent = dict.fromkeys(("confidences", "labels", "policy_before", "label_divergence"))
    first, second = read_rows(run.groups)
    unscored = {"scores": [None] * 8, "margins": None, "anchor_score": None}
    write_rows(run.groups, [row | absent | {"left_out": True} for row in (first, second | unscored)])
    run.revisited.unlink()
    write_report([run], run.report)
    with Page(tmp_path / "profile") as page:
        open_on_all(page, run)
        shown = page.run(DETAIL)
        assert "No update learned from this group" in shown and "8 candidates, best score first" in shown
        assert "label distribution" not in shown
        page.run("[...document.querySelectorAll('.list button')].at(1).click()")
        shown = page.run(DETAIL)
        assert "8 candidates" in shown and "best score first" not in shown and shown.count("unscored") == 8
        assert page.errors == []


def test_a_group_shows_what_its_method_has(build: Build, tmp_path: Path) -> None:
    """Advantages and no labels (GRPO); then no score at all, and one candidate (SinglePair-DPO)."""
    run = build(held_out=0, groups=2)
    absent = dict.fromkeys(("confidences", "labels", "policy_before", "anchor_score", "margins"))
    first, second = (row | absent for row in read_rows(run.groups))
    single = {key: second[key][:1] for key in ("candidates", "lengths")}
    write_rows(run.groups, [first | {"advantages": [0.5] * 8}, second | single | {"scores": None}])
    run.revisited.unlink()
    write_report([run], run.report)
    with Page(tmp_path / "profile") as page:
        open_on_all(page, run)
        shown = page.run(DETAIL)
        assert "8 candidates, best score first" in shown and "A0.500" in shown
        assert "label distribution" not in shown and "scored" not in shown and "KL" not in shown
        page.run("[...document.querySelectorAll('.list button')].at(1).click()")
        shown = page.run(DETAIL)
        assert "The student's candidate" in shown and "unscored" not in shown and "score" not in shown
        assert page.errors == []


def live_status(every: float | None, written: float) -> LiveStatus:
    stages = [("anchors", "done"), ("sft", "done"), ("align", "running"), ("evaluate", "to do")]
    lights = [Light("Entropy of D", "green", "0.9 of ln K", "between 0.2 and 0.99")]
    return LiveStatus(stages, True, "align", ("step 34 of 120", "about 12 min left"), 0.28, lights, written, every)


@pytest.mark.parametrize("width", [1400, 390])
def test_a_live_page_is_whole_and_loads_itself_again(build: Build, tmp_path: Path, width: int) -> None:
    run = build(held_out=0)
    run.results.unlink()
    seen = read_run(run, newest=8)
    write_live_page(seen, live_status(1.0, time.time()), run.report)
    with Page(tmp_path / "profile") as page:
        page.resize(width, 844)
        page.open(run.report.as_uri())
        assert page.run(CUT_OFF) == []
        assert page.run("document.querySelector('#age').textContent").startswith("Written ")
        assert page.run("document.querySelector('.list button').textContent").startswith("Case 39:"), "the newest"
        page.run("document.title = 'before'")
        type_into(page, SEARCH, "input", "case")
        page.run("new Promise((done) => setTimeout(() => done(0), 2500))", wait=True)
        assert page.run("document.title") == "before", "nothing is taken away from a reader who searches"
        write_live_page(seen, live_status(None, time.time() - 3600), run.report)
        type_into(page, SEARCH, "input", "")
        page.wait_for("Page.loadEventFired")
        assert page.run("document.querySelector('#age').textContent").endswith("it is not written any more.")
        assert page.errors == []


def test_a_live_page_without_news_says_so(build: Build, tmp_path: Path) -> None:
    run = build(held_out=0, logged=False)
    write_live_page(read_run(run, newest=8), live_status(60.0, time.time() - 3600), run.report)
    with Page(tmp_path / "profile") as page:
        page.open(run.report.as_uri())
        assert page.run("document.querySelector('#age').textContent").startswith("Nothing new for 60 min")
