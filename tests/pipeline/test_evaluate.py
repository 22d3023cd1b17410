"""What the evaluation stage makes of answers."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np

from purld.config.load import parse_config
from purld.display.progress import Reporter
from purld.pipeline import evaluate
from purld.pipeline.context import RunContext
from purld.records import Generation
from purld.runs.files import write_rows
from purld.runs.run_dir import RunDir


def test_greedy_answers_to_a_prompt_count_once(tmp_path, monkeypatch):
    """Several greedy answers to a prompt are one: two prompts are two observations, not six."""

    def answer_prompts(load, prompts, encoder, sampler, samples, batch_size, seed, path, check, progress):
        rows = [
            asdict(Generation(str(p), n, "", 1, True)) | {"correct": p == 0} for p in range(2) for n in range(samples)
        ]
        write_rows(path, rows)
        return []

    monkeypatch.setattr(evaluate, "answer_prompts", answer_prompts)
    values = {"student": {"model": "m"}, "data": {"prompts": "p"}, "teacher": {"kind": "local", "model": "t"}}
    config = parse_config(values | {"evaluate": {"temperature": 0, "samples": 3}}, "x")
    pools = SimpleNamespace(held_out=[])
    context = RunContext(
        config, RunDir(tmp_path), Reporter(), None, lambda prompt, text: True, pools, resend_unknown=False
    )
    answers = evaluate._model_answers(context, "base", "m")
    assert np.array_equal(answers.correct, [[True] * 3, [False] * 3])
    assert np.array_equal(answers.greedy_correct, [[True], [False]])
