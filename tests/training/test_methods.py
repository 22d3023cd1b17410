"""Every method through the real pipeline with a tiny student: same prompts and updates, the same bits after a kill."""

import itertools
import shutil

import pytest
from misbehaving import completion, serving

from purld.config import load_config
from purld.console import Reporter
from purld.method.table import METHODS
from purld.pipeline import Pipeline
from purld.rundir import RunDir, read_rows

SECOND_STAGE = [name for name, method in METHODS.items() if method.stage_two]
SEVERAL_UPDATES = [f"{name}+2" for name in ("anchor_grpo", "self_ppo")]


class KilledError(BaseException):
    """In the place of a SIGKILL: nothing catches it."""


def rate(handler):
    """A teacher that likes long candidates."""
    _, _, candidate = handler.prompt.partition("Candidate Answer:\n")
    handler.reply(completion(f"{min(1.0, len(candidate) / 100):.2f}" if candidate else "An answer."))


@pytest.fixture(scope="module")
def teacher():
    with serving() as server:
        server.default = rate
        yield server


@pytest.fixture(scope="module")
def after_stage_one(module_config, teacher, tmp_path_factory):
    """Makes runs of four steps whose anchors and p_sft are there already; `method+2` makes two updates per rollout."""
    teacher_section = f"teacher={{kind: openai, base_url: '{teacher.url}', model: m, max_calls: 100}}"

    def pipeline(run, method, *overrides):
        name, _, updates = method.partition("+")
        chosen = [teacher_section, "align.steps=4", f"align.method={name}", *overrides]
        chosen += [f"align.updates_per_rollout={updates}"] if updates else []
        return Pipeline(load_config(module_config, chosen), run, Reporter())

    base = RunDir(tmp_path_factory.mktemp("runs") / "base")
    pipeline(base, "ldl_grpo").execute(["anchors", "sft"])
    count = itertools.count()

    def make(method, *overrides):
        run = RunDir(base.path.with_name(f"run{next(count)}"))
        shutil.copytree(base.path, run.path)
        return pipeline(run, method, *overrides)

    return make


def outcome(run):
    """What two equal Stage II runs share: weights, metrics, groups."""
    weights = (run.align / "model.safetensors").read_bytes()
    return weights, read_rows(run.metrics), read_rows(run.groups)


def killed_at(pipeline, step, monkeypatch):
    """Run Stage II until `step` is logged, and no further."""
    log = RunDir.log

    def kill(self, stage, at, values):
        log(self, stage, at, values)
        if stage == "align" and at == step:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "log", kill)
        with pytest.raises(KilledError):
            pipeline.execute(["align"])


@pytest.mark.parametrize("method", [*SECOND_STAGE, *SEVERAL_UPDATES])
def test_killed_in_stage_two_a_run_ends_with_the_same_bits(method, teacher, after_stage_one, monkeypatch):
    calm, killed = after_stage_one(method), after_stage_one(method)
    before = len(teacher.arrived)
    calm.execute(["align"])
    bought = len(teacher.arrived) - before
    killed_at(killed, 3, monkeypatch)
    Pipeline(killed.config, killed.run, Reporter()).execute(["align"])
    assert outcome(killed.run) == outcome(calm.run)
    # What was scored before the kill is not paid for again, and nobody but the judged method pays.
    assert len(teacher.arrived) - before == 2 * bought
    assert (bought > 0) == (method == "teacher_judge_grpo")
