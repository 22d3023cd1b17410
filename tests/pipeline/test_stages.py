"""What a stage makes of what it was given."""

from types import SimpleNamespace

import numpy as np

from purld.config.load import parse_config
from purld.display.progress import Reporter
from purld.pipeline import stages
from purld.pipeline.stages import StageContext
from purld.runs.files import write_rows
from purld.runs.run_dir import RunDir


def test_greedy_answers_to_a_prompt_count_once(tmp_path, monkeypatch):
    """Several greedy answers to a prompt are one: two prompts are two observations, not six."""

    def answer_prompts(load, prompts, encoder, decoding, samples, batch_size, seed, path, check, progress):
        write_rows(path, [{"correct": prompt == 0} for prompt in range(2) for _ in range(samples)])
        return []

    monkeypatch.setattr(stages, "answer_prompts", answer_prompts)
    values = {"student": {"model": "m"}, "data": {"prompts": "p"}, "teacher": {"kind": "local", "model": "t"}}
    config = parse_config(values | {"evaluate": {"temperature": 0, "samples": 3}}, "x")
    pools = SimpleNamespace(held_out=[])
    job = StageContext(
        config, RunDir(tmp_path), Reporter(), None, lambda prompt, text: True, pools, resend_unknown=False
    )
    found = stages._answers(job, "base", "m")
    assert np.array_equal(found.correct, [[True] * 3, [False] * 3])
    assert np.array_equal(found.greedy_correct, [[True], [False]])
