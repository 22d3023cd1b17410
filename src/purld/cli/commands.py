"""The commands for runs, their results and the testbed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from purld import ranks
from purld.cli.common import (
    ConfigPath,
    Live,
    Overrides,
    ResendUnknown,
    RunDirOption,
    app,
    execute,
    existing_run,
    make_pipeline,
    make_reporter,
    open_config,
    print_closing,
    print_table,
    watching,
)
from purld.errors import UserError, printable

testbed_app = typer.Typer(no_args_is_help=True, help="The synthetic world that the demo runs in.")
app.add_typer(testbed_app, name="testbed")


@app.command()
def demo(
    overrides: Overrides = None,
    task: Annotated[
        str, typer.Option(help="counting, writing or scenes; scenes-mc or scenes-rationale for one half of scenes.")
    ] = "counting",
    student: Annotated[
        str | None, typer.Option(help="With scenes: qwen2_5_vl or llava.", show_default="qwen2_5_vl")
    ] = None,
    run_dir: RunDirOption = None,
    live: Live = False,
) -> None:
    """Run the whole loop on the testbed.

    Anchors, SFT, LDL-GRPO, evaluation, report: an ordinary run with a tiny student and a local teacher.
    Takes three to five minutes on two cores.
    """
    from purld.testbed.demo import prepare_demo

    reporter = make_reporter()
    with prepare_demo(task, run_dir, overrides or [], student) as (config, run):
        pipeline = make_pipeline(config, run, reporter)
        with watching(pipeline, live):
            pipeline.execute()
    print_closing(run)


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resend_unknown: ResendUnknown = False,
    live: Live = False,
) -> None:
    """Run every stage that is not finished.

    Anchors, SFT, alignment, evaluation, report.
    """
    execute(config, overrides, run_dir, None, resend_unknown, live)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Validate everything and show the plan.

    What will be sent, what it may cost at most, memory and steps. Uses no network but a rollout engine's, if one is
    configured.
    """
    settings, run = open_config(config, overrides, run_dir)
    from purld.pipeline.plan import make_plan
    from purld.pipeline.plan_sheet import print_plan

    print_plan(make_plan(settings, run))


@app.command()
def anchors(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resend_unknown: ResendUnknown = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Send nothing; write every request that would be sent to stdout, as JSONL, byte for byte."
        ),
    ] = False,
) -> None:
    """Ask the teacher once for each prompt."""
    if dry_run:
        _dry_run(config, overrides, run_dir, resend_unknown)
    else:
        execute(config, overrides, run_dir, ["anchors"], resend_unknown)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Stage I: fine-tune on the anchors."""
    execute(config, overrides, run_dir, ["sft"])


@app.command()
def align(config: ConfigPath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Stage II: align by align.method. Uses no network, unless the teacher judges candidates."""
    execute(config, overrides, run_dir, ["align"])


@app.command()
def probe(config: ConfigPath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Measure whether the student can evaluate itself.

    Every scorer, without gold, on up to 64 prompts that have anchors: on p_sft after Stage I, on the student before.
    """
    settings, run = open_config(config, overrides, run_dir)
    from purld.display.probe import print_probe

    print_probe(make_pipeline(settings, run, make_reporter()).probe())


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resend_unknown: ResendUnknown = False,
) -> None:
    """Answer the held-out prompts; judge the answers."""
    execute(config, overrides, run_dir, ["evaluate"], resend_unknown)


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run directories; or a CONFIG and overrides.", show_default=False),
    ],
    run_dir: RunDirOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write; RUN/report.html for one run, report.html for several."),
    ] = None,
) -> None:
    """Write the report of one run or of several."""
    first, *overrides = runs
    if Path(first).is_file() or (first.endswith((".yaml", ".yml")) and not Path(first).is_dir()):
        execute(Path(first), overrides, run_dir, ["report"])
    else:
        from purld.runs.files import check_new_file

        paths = [existing_run(Path(run)) for run in runs]
        if out is not None:
            check_new_file(out)
        from purld.report.page import report_runs

        print(ranks.on_first(lambda: report_runs(paths, out)))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another run directory.", show_default=False)],
    judge: Annotated[
        bool, typer.Option("--judge", help="Ask RUN_A's judge about the two models' answers head to head.")
    ] = False,
) -> None:
    """Say whether one run's model beats another's.

    RUN_A's final model against RUN_B's, paired on the same held-out prompts.
    """
    existing_run(run_b)
    existing_run(run_a)
    from purld.pipeline.compare import compare_runs, print_comparison

    print_comparison(compare_runs(run_a, run_b, judge, make_reporter()))


@app.command()
def sweep(
    config: ConfigPath,
    grid: Annotated[
        list[str],
        typer.Argument(metavar="KEY.PATH=VALUE,VALUE...", help="Keys and the values they take.", show_default=False),
    ],
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="The folder of the runs; runs/<name of CONFIG>-sweep by default.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time; each needs the memory of one run.")] = 1,
) -> None:
    """Run every combination of the given values.

    Runs share anchors and Stage I wherever they can.
    """
    from purld.config.load import load_config

    load_config(config)  # before torch is imported
    from purld.pipeline.sweep import plan_sweep, run_sweep

    cells = plan_sweep(config, grid, run_dir or Path("runs") / f"{config.stem}-sweep")
    run_sweep(config, cells, jobs, make_reporter())


@app.command()
def methods() -> None:
    """List the alignment methods."""
    from purld.methods.table import METHODS

    print_table(
        ["method", "signal", "objective", "teacher calls"],
        [[m.name, m.signal, m.objective, m.teacher_calls] for m in METHODS.values()],
    )


@app.command()
def tasks() -> None:
    """List the tasks that come with purld."""
    from purld.tasks.registry import TASKS
    from purld.testbed.shipped import DEMOS

    rows = [[task, "testbed", f"purld demo --task {task}"] for task in DEMOS]
    rows += [[name, task.check, f"data.task and data.path, {task.path}"] for name, task in TASKS.items()]
    print_table(["task", "check", "use it with"], rows)


@app.command()
def export(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="The directory to write; RUN/export by default.")] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="align, or sft for Stage I's model; the run's last one by default.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; that of the run by default.", show_default=False)
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Export the LoRA adapter alone, for the base model.")
    ] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="Add a GGUF file, by llama.cpp's converter.")] = False,
    gguf_type: Annotated[str, typer.Option(help="auto (16 bits), f32, f16, bf16 or q8_0.")] = "auto",
    converter: Annotated[
        Path | None,
        typer.Option(help="convert_hf_to_gguf.py, or the folder of llama.cpp that holds it.", show_default=False),
    ] = None,
) -> None:
    """Export a run's model for serving, with adapters merged.

    The directory also holds a model card and an Ollama Modelfile.
    """
    from purld.pipeline.gguf_converter import GGUF_TYPES, find_converter
    from purld.runs.files import check_new_folder

    existing_run(run_path)
    if out is not None:
        check_new_folder(out)
    if gguf_type not in GGUF_TYPES:
        raise UserError(f"--gguf-type {gguf_type}: give {', '.join(GGUF_TYPES)}.")
    command = find_converter(converter) if gguf or converter is not None else None
    from purld.pipeline.export import ExportOptions, export_model

    print(export_model(run_path, out, ExportOptions(stage, adapter, dtype, command, gguf_type)))


@app.command("import-gguf")
def import_gguf(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file of a causal LM.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Turn a GGUF file into a model directory for a student."""
    from purld.pipeline.import_gguf import import_gguf as convert

    print(convert(file, out, dtype))


@app.command()
def ledger(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    export_to: Annotated[
        Path | None, typer.Option("--export", help="Write every request and answer to this JSONL file.")
    ] = None,
    cancel: Annotated[
        bool,
        typer.Option("--cancel-batches", help="Cancel batches under way; what they have answered is billed and kept."),
    ] = False,
) -> None:
    """Show what was sent to remote models and what it cost.

    With --export, write every request and answer to a file.
    """
    existing_run(run_path)
    from purld.pipeline.ledger_totals import cancel_batches, ledger_totals, list_open_batches

    if cancel:
        print("\n".join(cancel_batches(run_path)) or "No batch is under way.")
        return
    rows = ledger_totals(run_path, export_to)
    names = [name for name in rows[0] if name != "role"]
    print_table(
        ["", *(row["role"] for row in rows)],
        [[name.replace("_", " "), *(_amount(row[name]) for row in rows)] for name in names],
    )
    for line in list_open_batches(run_path):
        print(printable(line))


@testbed_app.command("build")
def testbed_build(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    student: Annotated[str, typer.Option(help="text, qwen2_5_vl or llava.")] = "text",
) -> None:
    """Train a tiny student of the demo again, on the CPU.

    The text student is trained from scratch, the image students on top of it in rounds. A build that was stopped
    continues after its last finished round.
    """
    from purld.testbed.students.build import build_student

    with make_reporter().progress("steps") as progress:
        build_student(out, seed=seed, progress=progress, student=student)


def _dry_run(config: Path, overrides: Sequence[str] | None, run_dir: Path | None, resend_unknown: bool) -> None:
    settings, run = open_config(config, overrides, run_dir)
    from purld.pipeline.pipeline import Pipeline
    from purld.pipeline.plan_requests import write_dry_run
    from purld.pipeline.prompt_pools import load_prompt_pools

    reporter = make_reporter()
    pools = load_prompt_pools(settings, Pipeline(settings, run, reporter).encoder, reporter.say)
    count, size = write_dry_run(sys.stdout, settings, pools, run, resend_unknown)
    reporter.say(f"{count:,} requests of {size:,} bytes would be sent; nothing was.")


def _amount(value: float) -> str:
    """Format money with four decimals and counts with separators."""
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
