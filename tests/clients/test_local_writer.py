"""A local vision-language model as the teacher."""

import pytest
from tiny_vlm import ARCHITECTURES, picture, write_model

from purld.clients.ledger import Ledger
from purld.clients.local_writer import LocalWriter
from purld.clients.open import open_client
from purld.config.clients import LocalModel
from purld.model.sample import Decoding
from purld.records import IMAGE, Prompt
from purld.templates import judge_turn


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_local_teacher_sees_the_pictures_and_its_ledger_tells_them_apart(kind, shipped_student, tmp_path):
    path = str(write_model(kind, shipped_student, tmp_path / "model"))
    prompts = [Prompt.from_text(f"What is {IMAGE}?", images=(picture(24, 24, seed),)) for seed in range(3)]
    writer = LocalWriter(path, Decoding(0.0, 8))
    together = writer.write(prompts, seed=0)
    assert together == [writer.write([prompt], seed=0)[0] for prompt in prompts]
    assert len({written.text for written in together}) > 1
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        client = open_client(LocalModel(kind="local", model=path, max_tokens_per_answer=8), ledger, "teacher")
        assert [reply.text for reply in client.ask(prompts)] == [written.text for written in together]
        assert ledger.totals("teacher")["prompts"] == 3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_mark_of_a_picture_in_an_answer_is_no_picture(kind, shipped_student, tmp_path):
    """A judge's prompt quotes texts by models, which may contain image markers."""
    writer = LocalWriter(str(write_model(kind, shipped_student, tmp_path / "model")), Decoding(0.0, 4))
    text = judge_turn(f"What is {IMAGE}?", "a cat", "<image>", "<|image_pad|>")
    (written,) = writer.write([Prompt.from_text(text, images=(picture(24, 24),))], seed=0)
    assert written is not None
