"""`purld chat`: every model of a run answers as it would in an evaluation, in columns or one below the other."""

import io
import sys

import pytest
import torch
import yaml
from rich.console import Console

from purld.cli import main
from purld.config.load import load_config
from purld.display.side_by_side import print_side_by_side
from purld.errors import UserError
from purld.model.load import load_encoder, load_model, load_roles, make_trainable, save_model, save_policy
from purld.model.sample import Decoding, GenerateSampler, seed_from_content
from purld.model.variants import ModelVariants
from purld.pipeline.chat import ChatSession, ChatSettings
from purld.records import Prompt
from purld.runs.run_dir import RunDir

QUESTIONS = ["How many legs has a spider?", "Say hello."]
SETTINGS = {"lora": ["student.lora.r=2"], "all weights": []}


def disturb(model, seed):
    """Move the trained weights far enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=SETTINGS)
def run(request, module_config, tmp_path_factory) -> RunDir:
    """A run of both stages, with weights that were moved at random."""
    config = load_config(module_config, [*SETTINGS[request.param], "evaluate.max_new_tokens=12"])
    run, student = RunDir(tmp_path_factory.mktemp("chat") / "run"), config.student
    run.path.mkdir()
    run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    encoder = load_encoder(student)
    run.begin("sft")
    model = make_trainable(student, load_model(student, student.model), 1)
    disturb(model, 1)
    save_model(student, model, encoder, run.sft)
    run.finish("sft", 1.0)
    run.begin("align")
    roles = load_roles(student, run.sft, 2)
    disturb(roles.policy, 2)
    save_policy(student, roles, run.sft, encoder, run.align)
    run.finish("align", 1.0)
    return run


def evaluated(run, question):
    """The answers of the models as evaluation loads them."""
    config = load_config(run.config)
    encoder = load_encoder(config.student)
    sampler = GenerateSampler(encoder, Decoding(config.evaluate.temperature, config.evaluate.max_new_tokens))
    prompt = Prompt.from_text(question)
    seed = seed_from_content("chat", config.seed, prompt.id)
    answers = []
    for folder in (config.student.model, run.sft, run.align):
        ((drawn,),) = sampler(load_model(config.student, folder), [encoder.encode_prompt(prompt)], 1, [seed])
        answers.append(encoder.read_reply(drawn.ids).answer)
    return answers


def test_answers_are_those_of_the_models_as_evaluation_loads_them(run):
    session = ChatSession(run.path, ChatSettings())
    assert session.models == ["base", "sft", "ldl_grpo"] and session.unfinished is None
    prompts = [Prompt.from_text(question) for question in QUESTIONS]
    (first, second) = ([a.text for a in answers] for answers in session.ask(prompts))
    assert first == evaluated(run, QUESTIONS[0])
    assert len(set(first)) == 3  # the models differ, so each is the right one
    # A prompt's answers do not depend on the others.
    alone = ChatSession(run.path, ChatSettings(keep=False))
    assert [a.text for a in next(alone.ask(prompts[1:]))] == second


def test_one_base_is_in_memory_under_adapters(run, monkeypatch):
    loaded = []
    monkeypatch.setattr("purld.model.variants.load_model", lambda *a: loaded.append(a) or load_model(*a))
    config = load_config(run.config)
    variants = ModelVariants(config.student, {"sft": run.sft, "ldl_grpo": run.align}, keep=True)
    for name in [*variants.names, *variants.names]:
        with variants.use(name):
            pass
    assert len(loaded) == (1 if config.student.lora else 3)


def purld_chat(monkeypatch, capsys, *arguments, typed=None):
    monkeypatch.setattr(sys, "argv", ["purld", "chat", *map(str, arguments)])
    if typed is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, *capsys.readouterr()


def test_prompts_from_flags_a_file_and_a_pipe(run, monkeypatch, capsys, tmp_path):
    file = tmp_path / "ask.txt"
    file.write_text(f"{QUESTIONS[1]}\n")
    monkeypatch.setenv("COLUMNS", "140")
    greedy = ["--temperature", "0", "--max-new-tokens", "4"]
    status, shown, _ = purld_chat(monkeypatch, capsys, run.path, "--prompt", QUESTIONS[0], "--file", file, *greedy)
    assert status == 0 and [line for line in shown.splitlines() if line.startswith(">")] == [
        f"> {question}" for question in QUESTIONS
    ]
    assert [line.split() for line in shown.splitlines() if line.startswith("Base")] == [["Base", "SFT", "LDL-GRPO"]] * 2
    status, piped, _ = purld_chat(
        monkeypatch, capsys, run.path, *greedy, typed="\n".join([QUESTIONS[0], "", QUESTIONS[1]])
    )
    assert status == 0 and piped == shown


def test_a_run_that_is_not_finished(run, monkeypatch, capsys, tmp_path):
    part = RunDir(tmp_path / "part")
    part.path.mkdir()
    part.config.write_text(run.config.read_text())
    with pytest.raises(UserError, match="stage sft is not finished"):
        ChatSession(part.path, ChatSettings())
    part.begin("sft")
    part.sft.symlink_to(run.sft)
    part.finish("sft", 1.0)
    status, shown, said = purld_chat(monkeypatch, capsys, part.path, "--prompt", "Hi.", "--max-new-tokens", "2")
    assert status == 0 and "LDL-GRPO is not trained yet; only the others answer." in said
    assert "SFT" in shown and "LDL-GRPO" not in shown
    assert "--file nowhere: does not exist" in purld_chat(monkeypatch, capsys, part.path, "--file", "nowhere")[2]


@pytest.mark.parametrize(("width", "lines"), [(120, 2), (60, 6)])
def test_columns_if_the_terminal_is_wide_enough(width, lines):
    console = Console(file=io.StringIO(), width=width)
    print_side_by_side(["A", "B", "C"], ["one [bold]", "two\x1b[31m", "three"], console)
    shown = console.file.getvalue()
    assert len(shown.rstrip().splitlines()) == lines
    assert "one [bold]" in shown and "\x1b" not in shown
