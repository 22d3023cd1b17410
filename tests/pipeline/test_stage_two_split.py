"""A run's prompts are split when Stage II begins, and stay as they were split, whatever is to measure the run later."""

import shutil
from pathlib import Path

import pytest
import yaml

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.model.load import load_encoder
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.pipeline.stage_two_split import plan_split, split_of_run
from purld.runs.files import read_json, read_rows, write_rows
from purld.runs.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("no_figures")


class KilledError(BaseException):
    """In the place of a SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def unjudged(module_config):
    """The tiny run without gold and without a judge, whose teacher has answered no held-out prompt."""
    values = yaml.safe_load(module_config.read_text())
    answers = Path(values["teacher"]["path"])
    few = answers.with_name("few.jsonl")
    few.write_text("".join(answers.read_text().splitlines(keepends=True)[:16]))
    values["teacher"]["path"], values["data"]["check"] = str(few), "none"
    values["align"] = {
        "method": "sft_sft",
        "steps": 3,
        "prompts_per_step": 5,
        "checkpoint_steps": 1,
        "validate_every": None,
    }
    values["sft"] |= {"validation_fraction": 0.4, "epochs": 1}
    values["evaluate"] = {"samples": 1, "max_new_tokens": 4}
    path = module_config.with_name("unjudged.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def judged(unjudged):
    """The same with a judge: a file of verdicts that nobody has given yet."""
    values = yaml.safe_load(unjudged.read_text())
    opponent = {"kind": "file", "path": str(unjudged.with_name("answers.jsonl"))}
    values["evaluate"] |= {"judge": {"kind": "file", "path": "verdicts.jsonl"}, "opponent": opponent}
    path = unjudged.with_name("judged.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def make_run(unjudged, tmp_path_factory):
    """Makes runs whose anchors and p_sft are there already."""
    folder = tmp_path_factory.mktemp("runs")
    base = RunDir(folder / "base")
    Pipeline(load_config(unjudged), base, Reporter()).execute(["anchors", "sft"])

    def make(name):
        shutil.copytree(base.path, folder / name)
        return RunDir(folder / name)

    return make


def execute(config, run, *stages):
    Pipeline(load_config(config), run, Reporter()).execute(stages)


def kill_in_step(step, config, run, monkeypatch):
    log = RunDir.log_metrics

    def log_metrics(self, stage, at, values):
        if at == step:
            raise KilledError
        log(self, stage, at, values)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(RunDir, "log_metrics", log_metrics)
        execute(config, run, "align")


def forget_split(run):
    """Make a manifest as an older version wrote it."""
    manifest = run._manifest()
    begun = manifest["begun"]
    begun["align"].pop("kept_out")
    run._write_manifest(manifest["finished"], begun, manifest["files"])


def pools_of(path):
    config = load_config(path)
    return config, load_prompt_pools(config, load_encoder(config.student), lambda line: None)


@pytest.fixture(scope="module")
def calm_runs(unjudged, judged, make_run):
    """The runs that nothing interrupts, by configuration."""
    runs = {path: make_run(f"calm-{path.stem}") for path in (unjudged, judged)}
    for path, run in runs.items():
        execute(path, run, "align")
    return runs


@pytest.mark.parametrize(
    ("drops", "older"), [(True, False), (False, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_stage_two_goes_on_with_the_prompts_that_it_began_with(
    drops, older, unjudged, judged, make_run, calm_runs, monkeypatch
):
    first, then = (judged, unjudged) if drops else (unjudged, judged)
    run = make_run(f"{drops}-{older}")
    kill_in_step(2, first, run, monkeypatch)
    if older:
        forget_split(run)
    execute(then, run, "align")
    assert read_rows(run.metrics) == read_rows(calm_runs[first].metrics)
    assert run.finished_stages()["align"]["prompts"] == (16 if drops else 11)
    split = split_of_run(*pools_of(then), run)
    assert split == plan_split(*pools_of(first))
    assert bool(split.models) != drops


def test_prompts_that_were_trained_on_are_not_called_kept_out(unjudged, judged, calm_runs, capsys):
    run = calm_runs[judged]
    execute(unjudged, run, "evaluate")
    results = read_json(run.results)
    assert "self_comparison" not in results and not run.generations("sft.validation").exists()
    (warning,) = [line for line in results["warnings"] if "own score" in line]
    assert "something else was to measure them when Stage II began" in warning
    assert warning.removeprefix("models") in " ".join(capsys.readouterr().err.split())


def test_no_prompt_that_an_older_run_drew_groups_of_counts_as_kept_out(unjudged, judged, make_run):
    run = make_run("older")
    planned = plan_split(*pools_of(unjudged))
    run.begin("align")
    write_rows(run.groups, [{"prompt_id": planned.models[0].id}])
    with pytest.raises(UserError, match="stage align is not finished"):
        execute(judged, run, "report")  # which is told of a judge, and goes by what the run was told
    assert split_of_run(*pools_of(judged), run).models == planned.models[1:]


def test_the_longest_answer_by_which_steps_are_compared_stays_too(unjudged, make_run):
    run = make_run("tokens")
    config, pools = pools_of(unjudged)
    run.begin("align", **plan_split(config, pools).to_facts())
    longer = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 99})})
    assert plan_split(longer, pools).answer_tokens == 99
    assert split_of_run(longer, pools, run).answer_tokens == 4
