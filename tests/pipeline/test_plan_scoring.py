"""The tokens of the plan against those that really go through the student, for every score and peer."""

import contextlib
import json
import re

import pytest
from counted_tokens import counted_tokens

from purld.config.load import load_config
from purld.config.methods import AnchorGrpo, LdlGrpo
from purld.display.progress import Reporter
from purld.model.load import Roles, load_encoder, load_model
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.plan import make_plan
from purld.pipeline.plan_scoring import tokens_of_stage
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.pipeline.stage_two_split import plan_split
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training.group_update import GroupUpdate, UnmeasuredGroup
from purld.training.scoring import SCORERS, GroupToScore, ScorerContext

WHOLE_PASS = ["data.max_prompts=4", "align.steps=2", "align.prompts_per_step=2"]
LIMIT = 20
BATCHES = (2, 16)  # of candidates that are scored together
METHODS = [
    ("in_context", ["align.score=in_context"]),
    ("reference", ["align.method=anchor_grpo", "align.score=reference"]),
    ("expected", ["align.score=expected"]),
    ("verbal", ["align.score=verbal"]),
    ("alone", ["align.method=self_ppo"]),
    ("self_distillation", ["align.method=self_distillation", "align.micro_batch_size=2"]),
]


def planned(config, run):
    """The figures of the plan: all tokens, and those of a step."""
    [line] = [line for line in make_plan(config, run).sections["Training"] if "tokens through the student" in line]
    whole, step = re.search(r"at most ([\d,]+) tokens through the student in all,.* ([\d,]+) a step", line).groups()
    return int(whole.replace(",", "")), int(step.replace(",", "")), line


class Work:
    """Does what Stage II does for the signal of a prompt's group, with candidates of full length."""

    def __init__(self, config):
        self.encoder = load_encoder(config.student)
        self.model = load_model(config.student, config.student.model)
        self.pools = load_prompt_pools(config, self.encoder, print)
        self.align = config.align
        # Words of the student's own, so that the text of a candidate has as many tokens as were drawn.
        words = self.encoder.encode_literal("one and two and three and four and five and six and seven")
        self.ids = [words[: self.align.max_new_tokens]] * self.align.drawn
        texts = [self.encoder.decode_text(ids) for ids in self.ids]
        assert [self.encoder.encode_literal(text) for text in texts] == self.ids
        self.texts = texts

    def run(self, prompt, anchor):
        roles = Roles(self.model, self.model)
        if self.align.method == "self_distillation":
            update = GroupUpdate(roles, self.align.micro_batch_size, self.encoder.pad, None, contextlib.nullcontext)
            anchored = self.encoder.encode_anchored_prompt(prompt, anchor, direct=False)
            group = UnmeasuredGroup(self.encoder.encode_prompt(prompt), self.ids, anchored)
            update.members(self.model, [group], keep_old=False)
            return
        anchored = self.align.method != "self_ppo"
        context = ScorerContext(self.encoder, roles, self.align, anchored, contextlib.nullcontext)
        SCORERS[self.align.score].make(context)([GroupToScore(prompt, anchor, self.texts, self.ids)])


@pytest.mark.parametrize(
    ("name", "overrides", "batch_size"),
    [(name, overrides, size) for name, overrides in METHODS for size in (BATCHES if name in SCORERS else BATCHES[:1])],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_the_plan_has_the_tokens_that_go_through_the_student(name, overrides, batch_size, tiny_config, tmp_path):
    """Anchors are in a file, some longer than a candidate and some cut at student.max_anchor_tokens."""
    batch = [] if name == "self_distillation" else [f"align.score_batch_size={batch_size}"]
    limits = ["align.max_new_tokens=8", f"student.max_anchor_tokens={LIMIT}", "align.candidates=3"]
    config = load_config(tiny_config, [*WHOLE_PASS, *overrides, *limits, *batch])
    work = Work(config)
    rows = map(json.loads, (tiny_config.parent / "answers.jsonl").read_text().splitlines())
    answers = {row["prompt"]: row["answer"] for row in rows}
    assert {work.encoder.encode_answer(answers[p.question]).cut for p in work.pools.align} == {False, True}
    prompts = work.pools.align
    work.run(prompts[0], answers[prompts[0].question])  # with the self-check of sharing
    with counted_tokens(work.model) as counts:
        for prompt in prompts:
            work.run(prompt, answers[prompt.question])
    actual = sum(counts)
    whole, step, line = planned(config, RunDir(tmp_path / "run"))
    assert whole == actual and step == -(-whole // 2)
    assert "student.max_anchor_tokens" not in line


@pytest.mark.parametrize(
    ("overrides", "title", "scored"),
    [
        (["align.score=in_context"], "scoring by in_context", 3),
        (["align.score=agreement", "align.validate_by=score", "data.check=exact"], "", 0),
        (["align.method=anchorrank_dpo", "align.score=reference"], "scoring by reference", 3),
        (["align.method=singlepair_dpo"], "comparing steps by in_context", 0),
    ],
)
def test_scores_that_compare_steps_are_counted(overrides, title, scored, tiny_config, tmp_path):
    """Before Stage II, after its first step and after its last, of one greedy answer to each prompt of the part."""
    compared = ["sft.validation_fraction=0.5", "align.validate_every=1", "align.steps=2", "align.prompts_per_step=99"]
    config = load_config(tiny_config, [*compared, *overrides, "align.max_new_tokens=8"])
    run = RunDir(tmp_path / "run")
    if not title:
        assert not any("through the student" in line for line in make_plan(config, run).sections["Training"])
        return
    work = Work(config)
    rows = map(json.loads, (tiny_config.parent / "answers.jsonl").read_text().splitlines())
    answers = {row["prompt"]: row["answer"] for row in rows}
    split = plan_split(config, work.pools)
    groups, kept_out = split.training, split.steps
    settings = LdlGrpo(score=title.split()[-1], score_batch_size=getattr(config.align, "score_batch_size", 8))
    context = ScorerContext(work.encoder, Roles(work.model, work.model), settings, True, contextlib.nullcontext)
    scorer = SCORERS[settings.score].make(context)

    def score(prompts, candidates):
        for prompt in prompts:
            drawn = work.texts[:1] * candidates, work.ids[:1] * candidates
            scorer([GroupToScore(prompt, answers[prompt.question], *drawn)])

    score(kept_out[:1], 2)  # with the self-check of sharing
    with counted_tokens(work.model) as counts:
        for _ in range(3):
            score(kept_out, 1)
        compares = sum(counts)
        for _ in range(2 if scored else 0):
            score(groups, scored)
    whole, step, line = planned(config, run)
    assert (whole, step) == (sum(counts), -(-sum(counts) // 2)) and line.startswith(title)
    assert (f" {compares:,} of them to compare steps" in line) == bool(scored)


def test_anchors_count_at_their_limit_until_they_are_there(tiny_config, tmp_path):
    endpoint = "teacher={kind: openai, base_url: 'http://127.0.0.1:9/v1', model: m}"
    settings = [*WHOLE_PASS, "align.score=in_context", "align.max_new_tokens=200"]  # longer than any anchor
    unknown = load_config(tiny_config, [*settings, endpoint])
    run = RunDir(tmp_path / "run")
    before, _, line = planned(unknown, run)
    assert "anchors of student.max_anchor_tokens" in line
    known = load_config(tiny_config, settings)
    Pipeline(known, run, Reporter()).execute(["anchors"])
    after, _, _ = planned(known, run)
    encoder = load_encoder(known.student)
    missing = [known.student.max_anchor_tokens - len(encoder.encode_literal(r["text"])) for r in read_rows(run.anchors)]
    # Once in the prompt, and once as a target alone, with its end-of-turn token; with candidates it is padded anyway.
    assert before - after == sum(missing) + sum(n - 1 for n in missing)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": 2}, 10 + 20 + 30 + 40),  # one pass of four prompts
        ({"steps": 3}, 100 + 30 + 40),
        ({"steps": 2, "prompts_per_step": 3}, 100),  # three, then the one that is left
        ({"steps": 3, "prompts_per_step": 3}, 100 + 20 + 30 + 40),
        ({"steps": 4, "prompts_per_step": 3, "updates_per_rollout": 2, "checkpoint_steps": 2}, 2 * (20 + 30 + 40)),
        ({"steps": 2, "prompts_per_step": 9}, 200),
    ],
)
def test_groups_of_the_whole_stage(settings, expected):
    align = AnchorGrpo(method="anchor_grpo", **{"prompts_per_step": 2} | settings)
    assert tokens_of_stage([30, 10, 40, 20], align) == expected


def test_prompts_that_stage_two_leaves_out_are_not_counted(tiny_config, tmp_path):
    endpoint = "teacher={kind: openai, base_url: 'http://127.0.0.1:9/v1', model: m}"
    unmeasured = [endpoint, "data.check=none", "sft.validation_fraction=0.5", "align.prompts_per_step=1"]
    config = load_config(tiny_config, unmeasured)
    pools = load_prompt_pools(config, load_encoder(config.student), print)
    drawn = len(plan_split(config, pools).training)
    assert drawn < len(pools.align)
    once, twice = (
        planned(load_config(tiny_config, [*unmeasured, f"align.steps={steps}"]), RunDir(tmp_path / "run"))[0]
        for steps in (drawn, 2 * drawn)
    )
    assert twice == 2 * once


def test_nothing_is_counted_where_the_student_computes_no_score(tiny_config, tmp_path):
    for overrides in (["align.method=sft_sft"], ["align.method=singlepair_dpo"], ["align.method=sft"]):
        lines = make_plan(load_config(tiny_config, overrides), RunDir(tmp_path / "run")).sections["Training"]
        assert not any("tokens through the student" in line for line in lines)
