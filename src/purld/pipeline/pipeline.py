"""Run the stages of a run in order.

A stage that the manifest calls finished is skipped. A configuration that contradicts what a run has already done is
refused. What a stage does is in `purld.pipeline.stages` and `purld.pipeline.evaluate`.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from purld import ranks
from purld.config.clients import TRANSPORT, TeacherAnchors
from purld.config.load import load_config
from purld.config.methods import StageTwoSettings
from purld.config.schema import Config
from purld.display.progress import Reporter
from purld.display.titles import STAGE_TITLES
from purld.errors import UserError
from purld.pipeline.chosen_score import with_chosen_score
from purld.pipeline.context import RunContext
from purld.pipeline.evaluate import run_evaluate
from purld.pipeline.ledger_totals import may_have_bought
from purld.pipeline.preflight import check_before_spending, check_judging, check_ledger
from purld.pipeline.probe import check_signal, probe_fingerprint, probed_scale, run_probe, takes_probe
from purld.pipeline.prompt_pools import PromptPools, load_prompt_pools
from purld.pipeline.stage_two_split import lacks_record, plan_split, split_of_older_run
from purld.pipeline.stages import run_align, run_anchors, run_report, run_sft
from purld.pipeline.teacher_answers import rebuild_answers
from purld.records import content_hash
from purld.runs.files import atomic_write, remove_stale_partials
from purld.runs.open import check_shared_disk, final_model, keeps_last_step, splits_without_near_copies
from purld.runs.run_dir import START_OVER, TRAINED, DamagedFile, RunDir
from purld.runs.shortfalls import describe_shortfalls, may_ask_again, stage_shortfalls
from purld.tasks.checks import find_check, missing_gold
from purld.training.trackers import check_trackers, stage_tracking

_RUNNERS: dict[str, Callable[[RunContext], dict[str, Any]]] = {
    "anchors": run_anchors,
    "sft": run_sft,
    "probe": run_probe,
    "align": run_align,
    "evaluate": run_evaluate,
    "report": run_report,
}
STAGES = tuple(_RUNNERS)
_OF_FIRST_RANK = ("anchors", "report")  # the stages whose work several processes do not share
_REPAIRED = ("anchors", "evaluate")  # their damaged files are made again by every command that includes them

# The first stage that each section of the configuration touches.
_FIRST_STAGE = {
    "student": "anchors",
    "data": "anchors",
    "teacher": "anchors",
    "anchors": "anchors",
    "seed": "anchors",
    "sft": "sft",
    "align": "align",
    "evaluate": "evaluate",
}


class Pipeline:
    """The stages of one run.

    Args:
        config: the validated configuration.
        run: the run directory; created when the first stage starts.
        reporter: prints progress, facts and warnings.
        resend_unknown: ask again where an answer may have been billed but never arrived.

    Raises:
        UserError: a tracker or a library for the check is missing, or the student cannot do what is configured: see
            `check_before_spending`.
    """

    def __init__(self, config: Config, run: RunDir, reporter: Reporter, resend_unknown: bool = False) -> None:
        config = _as_begun(with_chosen_score(config), run)
        self.config = config
        self.run = run
        self.reporter = reporter
        self.resend_unknown = resend_unknown
        self.check = find_check(config.data)
        check_trackers(config.report_to)
        self.encoder, _ = check_before_spending(config, run)

    def probe(self) -> dict[str, Any]:
        """Measure every scorer on prompts that have anchors, write probe.json, and return its content.

        Raises:
            UserError: the method has no self-evaluation against the anchor, or there are no anchors yet.
        """
        if not takes_probe(self.config.align):
            raise UserError(f"align.method {self.config.align.method} does not score candidates against the anchor.")
        if "anchors" not in self.run.finished_stages():
            raise UserError(f"{self.run.path}: the probe needs anchors; run `purld anchors` first.")
        pools = load_prompt_pools(self.config, self.encoder, self.reporter.say)
        with self._locked():
            ranks.on_first(lambda: self._check_before_probe(pools))
            facts = run_probe(self._context(pools), every_scorer=True)
            ranks.on_first(lambda: self.run.record_file("probe", self.run.probe))
        return facts

    def _check_before_probe(self, pools: PromptPools) -> None:
        self._check_pools(pools)
        self.run.check_files(self.run.anchors, self.run.sft)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the run, in rank 0, for all ranks."""
        with contextlib.ExitStack() as stack:
            ranks.on_first(lambda: stack.enter_context(self.run.lock()))
            yield

    def _context(self, pools: PromptPools) -> RunContext:
        return RunContext(self.config, self.run, self.reporter, self.encoder, self.check, pools, self.resend_unknown)

    def execute(self, stages: Sequence[str] = STAGES) -> None:
        """Run the given stages in order, skipping what is finished.

        Raises:
            UserError: the input, the configuration or an earlier stage does not allow it.
        """
        self.run.check_place()
        pools = load_prompt_pools(self.config, self.encoder, self.reporter.say)
        check_judging(self.config, pools, self.run)
        if missing := missing_gold(self.config.data, pools.held_out):
            raise UserError(missing)
        ranks.check_same("the prompts", pools.fingerprint)
        with self._locked():
            text = ranks.on_first(lambda: self._prepare(pools, stages))
            check_shared_disk(self.run, text)
            context = self._context(pools)
            for stage in self._with_probe(stages):
                self._execute(stage, context, alone=len(stages) == 1)

    def _prepare(self, pools: PromptPools, stages: Sequence[str]) -> str:
        """Check what the run holds against its configuration and its prompts, and return config.yaml as written."""
        remove_stale_partials(self.run.path)
        text = self._check_config()
        self._check_pools(pools)
        self._record_split_of_older_run(pools)
        self._write_config(text)
        if any(stage != "report" for stage in stages):
            check_ledger(self.config, self.run)
        return text

    def _execute(self, stage: str, context: RunContext, alone: bool) -> None:
        """Run a stage unless it is done; rank 0 decides, and keeps the records."""
        if not ranks.on_first(lambda: self._begin(stage, context, alone)):
            return
        runner = _RUNNERS[stage]
        with self._noting_seconds(stage), stage_tracking(self.config.report_to, self.run, stage):
            facts = ranks.on_first(lambda: runner(context)) if stage in _OF_FIRST_RANK else runner(context)
        ranks.on_first(lambda: self.run.finish(stage, self.run.seconds_spent(stage), **facts))
        if ranks.is_first():
            shutil.rmtree(self.run.checkpoints(stage), ignore_errors=True)

    @contextlib.contextmanager
    def _noting_seconds(self, stage: str) -> Iterator[None]:
        """Record the time spent on a stage that an error or a signal stops, to which the next process adds its own."""
        try:
            yield
        except BaseException:
            if ranks.is_first():
                with contextlib.suppress(OSError, UserError):  # what stopped the stage is what the user has to know
                    self.run.note_seconds(stage)
            raise

    def _begin(self, stage: str, context: RunContext, alone: bool) -> bool:
        """Return whether a stage has to run, and record that it begins.

        It has to if it takes part, and if it is not finished or its files are damaged and can be made again.
        """
        if not self._takes_part(stage):
            return False
        if stage in self.run.finished_stages():
            again = self._runs_again(stage)
            damaged = self.run.damaged_files_of(stage) if stage in _REPAIRED or (alone and stage in TRAINED) else []
            if not damaged and not again:
                shutil.rmtree(self.run.checkpoints(stage), ignore_errors=True)  # left by a kill after the record
                self.reporter.say(f"{STAGE_TITLES[stage]}: done before.")
                self._warn_of_caps(stage)
                return False
            if damaged and self._repaired(stage, damaged, context) and not again:
                return False
        self._check_start(stage)
        fixed = self._fixed_for_stage_two(context) if stage == "align" else {}
        self.run.begin(stage, prompts=len(context.pools.train), held_out=len(context.pools.held_out), **fixed)
        self.reporter.headline(STAGE_TITLES[stage])
        if stage == "sft":
            self._warn_of_caps("anchors")
        return True

    def _fixed_for_stage_two(self, context: RunContext) -> dict[str, Any]:
        """Return what Stage II goes by from its beginning to its end, also where another version goes on with it."""
        assert isinstance(self.config.align, StageTwoSettings)
        scale = probed_scale(self.config.align, self.run.finished_stages().get("probe"))
        return plan_split(self.config, context.pools).to_facts() | {"margin_scale": scale}

    def _warn_of_caps(self, stage: str) -> None:
        """Say what caps left out of a finished stage."""
        for sentence in describe_shortfalls(self.run, stage, stage_shortfalls(self.run, stage)):
            self.reporter.warn(sentence)

    def _check_start(self, stage: str) -> None:
        """Check that earlier stages are finished and their files intact, and that Stage II has a signal.

        It is called before the stage has begun, so that its settings may still change.
        """
        for earlier in STAGES[: STAGES.index(stage)]:
            if earlier != "probe" and self._takes_part(earlier) and earlier not in self.run.finished_stages():
                raise UserError(f"{self.run.path}: stage {earlier} is not finished; run `purld {earlier}` first.")
        run = self.run
        read = {
            "sft": [run.anchors],
            "probe": [run.anchors, run.sft],
            "align": [run.anchors, run.sft, run.metrics],
            "evaluate": [run.sft, run.align, run.groups.parent],
        }
        run.check_files(*read.get(stage, []), writer=stage)
        if stage == "align":
            assert isinstance(self.config.align, StageTwoSettings)
            check_signal(self.config.align, run.finished_stages().get("probe"))

    def _repaired(self, stage: str, damaged: Sequence[DamagedFile], context: RunContext) -> bool:
        """Write damaged anchors again as they were; else remove the damaged files of a stage.

        Returns:
            Whether the files are whole again; else the stage runs again.

        Raises:
            UserError: later stages have used files that cannot be made again as they were.
        """
        used = bool(self.run.begun_after(stage))
        if stage in TRAINED:
            self.run.check_files(*(file.path for file in damaged if used or file.path == self.run.metrics))
            shutil.rmtree(self.run.path / stage, ignore_errors=True)  # its files may be links that a sweep shares
        for file in damaged:
            self.reporter.say(f"{file}; it is made again.")
        if stage == "anchors" and self._rebuilt(damaged, context, used):
            return True
        for file in damaged:
            file.path.unlink(missing_ok=True)
        return False

    def _rebuilt(self, damaged: Sequence[DamagedFile], context: RunContext, used: bool) -> bool:
        """Write damaged anchors again from what was bought, and return whether they are as they were.

        Raises:
            UserError: they are not, and later stages have used them.
        """
        with contextlib.nullcontext() if used else contextlib.suppress(UserError):
            rebuild_answers(context, [file.path for file in damaged])
        still = self.run.damaged_files_of("anchors")
        if still and used:
            raise UserError(f"{still[0].path}: cannot be made again as Stage I has read it; {START_OVER}.")
        return not still

    def _runs_again(self, stage: str) -> bool:
        """Return whether a finished stage runs again.

        The report always does; the probe does if settings that it depends on have changed, until Stage II has begun. A
        stage in which a cap left something unasked does once that cap is raised. The anchors also do with
        `resend_unknown`, and if the opponent was added to the configuration; but never once Stage I has begun.
        """
        if stage == "probe" and "align" not in self.run.begun_stages():
            return bool(self.run.finished_stages()["probe"]["fingerprint"] != probe_fingerprint(self.config))
        if stage == "report" or not may_ask_again(self.run, stage):
            return stage == "report"
        if stage == "anchors" and (self.resend_unknown or self._lacks_opponent()):
            return True
        return any(shortfall.is_raised(self.config) for shortfall in stage_shortfalls(self.run, stage))

    def _lacks_opponent(self) -> bool:
        return isinstance(self.config.evaluate.opponent, TeacherAnchors) and not self.run.opponent.exists()

    def _takes_part(self, stage: str) -> bool:
        if stage == "probe":
            return takes_probe(self.config.align)
        return stage != "align" or final_model(self.config.align.method).stage == "align"

    def _with_probe(self, stages: Sequence[str]) -> list[str]:
        """Return the stages with the probe before Stage II."""
        kept = [stage for stage in stages if stage != "probe" or "align" not in stages]
        return [part for stage in kept for part in (("probe", "align") if stage == "align" else (stage,))]

    def _check_config(self) -> str:
        """Check that the configuration agrees with the one that the run began with, and return it as config.yaml.

        Raises:
            UserError: a key of a stage that has begun differs, or files of the run are lost.
        """
        run, new = self.run, self.config.model_dump(mode="json")
        text = yaml.safe_dump(new, sort_keys=False)
        self._check_adoptable(text)
        if (recorded := self._recorded_config()) is not None:
            old, begun = recorded.model_dump(mode="json"), self._binding_stages()
            free = TRANSPORT | ({"near_duplicates"} if splits_without_near_copies(run) else set())
            for key, before, after in _differences(old, new):
                section, *between, leaf = key.split(".")
                # What is in extra_body is part of the request, whatever its name.
                is_free = section == "report_to" or (leaf in free and "extra_body" not in between)
                if not is_free and _FIRST_STAGE[section] in begun:
                    raise UserError(
                        f"{run.path} holds a run with {key}: {_brief(before)}, and now it is {_brief(after)}; "
                        "give this one another --run-dir."
                    )
        return text

    def _binding_stages(self) -> set[str]:
        """Return the stages that have begun and bind the run to their settings.

        Anchors that were asked for in vain do not: what a refused request needs is another setting.
        """
        begun = self.run.begun_stages()
        in_vain = begun == {"anchors"} and not self.run.finished_stages() and not may_have_bought(self.run)
        return set() if in_vain else begun

    def _recorded_config(self) -> Config | None:
        """Return the configuration that the run was last continued with; None if it has none that can be read.

        Loading fills in keys that are newer than the run with their defaults, which were in force when it began.
        """
        run = self.run
        if not run.config.exists() or run.damaged_files(run.config):
            return None
        return load_config(run.config, ["align.validate_every=null"] if keeps_last_step(run) else [])

    def _record_split_of_older_run(self, pools: PromptPools) -> None:
        """Record the split of a Stage II that an older version began, before another configuration takes its place."""
        if lacks_record(self.run):
            config = self._recorded_config() or self.config
            self.run.note_facts("align", **split_of_older_run(config, pools, self.run).to_facts())

    def _write_config(self, text: str) -> None:
        run = self.run
        run.forget_file(run.config)
        with atomic_write(run.config) as handle:
            handle.write(text)
        run.record_file("config", run.config)

    def _check_adoptable(self, text: str) -> None:
        """Check that nothing is lost by writing `text` as config.yaml.

        Raises:
            UserError: stages have left files and the manifest is gone, or config.yaml is damaged and `text` is another
                configuration than it held.
        """
        run = self.run
        run.check_manifest()
        for damaged in run.damaged_files(run.config):
            record = run.recorded(run.config)
            if record is not None and record.sha256 != hashlib.sha256(text.encode()).hexdigest():
                raise UserError(
                    f"{damaged}; run the configuration that this run began with, which writes it anew, or give another "
                    "--run-dir."
                )

    def _check_pools(self, pools: PromptPools) -> None:
        done = self.run.finished_stages().get("anchors")
        if done and done["pool"] != pools.fingerprint:
            older = self.run.config.exists() and splits_without_near_copies(self.run)
            hint = " The run began without a search for near-copies: data.near_duplicates=ignore goes on so."
            raise UserError(
                f"{self.run.path}: the prompts of {self.config.data.source} have changed since this run's anchors "
                f"were collected; give the new ones another --run-dir.{hint if older else ''}"
            )


def _as_begun(config: Config, run: RunDir) -> Config:
    """Let a run that was in Stage II before steps were compared go on with the prompts that it has."""
    align = config.align
    if (
        "validate_every" in align.model_fields_set
        or not isinstance(align, StageTwoSettings)
        or not keeps_last_step(run)
    ):
        return config
    return config.model_copy(update={"align": align.model_copy(update={"validate_every": None})})


def _brief(value: Any) -> str:
    """Return a value as a sentence shows it: a chat template is not quoted whole."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:40]}… ({content_hash(value)})"


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List the keys, as dotted paths, in which two configurations differ, with both values."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [(prefix, old, new)]
    keys = [*old, *(key for key in new if key not in old)]
    return [
        found
        for key in keys
        for found in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    ]
