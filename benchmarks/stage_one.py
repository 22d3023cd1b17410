"""Time the steps of Stage I: logits of the answers' tokens alone against TRL's, which without Triton are of all.

    python benchmarks/stage_one.py DIR --problems PROBLEMS.jsonl     a student's directory; rows of prompt and teacher

Both train the same adapter on the same batches of 16 rows, after one step as a warm-up. Times are processor seconds of
one thread, so that other work on the machine changes little; the steps' losses are printed to show that they agree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from step import LORA
from trl import SFTTrainer

from purld.config.schema import Sft, Student
from purld.model.load import load_encoder
from purld.records import Anchor, Prompt
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training.context import StageContext
from purld.training.sft import _SftTrainer, fine_tune

BATCH = 16


def main() -> None:
    """Print the seconds of a step either way, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory; its tokenizer has a chat template")
    parser.add_argument("--problems", type=Path, required=True, help="rows of prompt and teacher")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    parser.add_argument("--chat-template", help="a file, for a model without a chat template")
    options = parser.parse_args()
    torch.set_num_threads(1)
    student = Student(
        model=options.model,
        lora=LORA,
        dtype="float32",
        max_anchor_tokens=128,
        chat_template=options.chat_template,
    )
    rows = read_rows(options.problems)[: BATCH * (options.steps + 1)]
    prompts = [Prompt.from_text(row["prompt"]) for row in rows]
    examples = [(p, Anchor(p.id, row["teacher"])) for p, row in zip(prompts, rows, strict=True)]
    seconds = {}
    for side, as_trl in (("all tokens", True), ("answers alone", False)):
        seconds[side], losses = time_steps(student, examples, as_trl)
        print(f"{side}: {seconds[side]:.2f} s a step; losses {', '.join(f'{loss:.6f}' for loss in losses)}", flush=True)
    print(f"ratio {seconds['all tokens'] / seconds['answers alone']:.2f}")


def time_steps(student: Student, examples: Sequence[tuple[Prompt, Anchor]], as_trl: bool) -> tuple[float, list[float]]:
    """Return the median processor seconds of a step of Stage I after the first, and the steps' losses.

    Args:
        student: the student.
        examples: prompts and their anchors, each trained on once.
        as_trl: use TRL's loss as it is.
    """
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext(
            student, load_encoder(student), RunDir(Path(folder)), 0, lambda *_: ends.append(time.process_time())
        )
        settings = Sft(epochs=1, batch_size=BATCH, micro_batch_size=8, validation_fraction=0, checkpoint_steps=10**6)
        patch = mock.patch.object(_SftTrainer, "compute_loss", SFTTrainer.compute_loss) if as_trl else nullcontext()
        with patch:
            fine_tune(context, settings, examples)
        losses = [row["loss"] for row in read_rows(context.run.metrics) if "loss" in row]
    return statistics.median(after - before for before, after in pairwise(ends)), losses


if __name__ == "__main__":
    main()
