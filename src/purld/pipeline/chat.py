"""Ask the models of a run the same thing: base, SFT and aligned, as far as the run has come.

Prompts are encoded and answers drawn as in the run's evaluation. Every prompt stands alone with a seed of its own, so
that its answers depend neither on other prompts nor on their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from purld.data.prompts import load_prompts
from purld.errors import UserError
from purld.model.load import load_encoder
from purld.model.sample import Decoding, GenerateSampler, seed_from_content
from purld.model.variants import ModelVariants
from purld.records import Prompt
from purld.runs.open import final_model, open_run


@dataclass(frozen=True)
class ChatSettings:
    """How answers are drawn; None stands for the run's own setting in `evaluate`, and for its seed.

    Attributes:
        temperature: 0 is greedy.
        max_new_tokens: the limit of an answer.
        seed: of the answers.
        keep: hold the weights of every model in memory between prompts.
    """

    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    keep: bool = True


@dataclass(frozen=True)
class ChatAnswer:
    """One model's answer: its text, what it thought before it, and whether it met the limit of tokens."""

    model: str
    text: str
    thinking: str
    cut: bool


class ChatSession:
    """The models of a run, to be asked.

    Args:
        run_path: a run directory.
        settings: how answers are drawn.

    Raises:
        UserError: it is no run, Stage I is not finished, or files of its models are damaged.
    """

    def __init__(self, run_path: Path, settings: ChatSettings) -> None:
        run, config = open_run(run_path)
        self.config = config
        finished = run.finished_stages()
        if "sft" not in finished:
            raise UserError(f"{run_path}: stage sft is not finished, so there is nothing to compare the base with.")
        folders = {"sft": run.sft}
        final = final_model(config.align.method)
        if final.stage == "align" and "align" in finished:
            folders[final.name] = run.align
        run.check_files(*folders.values())
        self.unfinished = final.name if final.name not in folders else None
        evaluate = config.evaluate
        self._decoding = Decoding(
            evaluate.temperature if settings.temperature is None else settings.temperature,
            settings.max_new_tokens or evaluate.max_new_tokens,
            evaluate.top_p,
        )
        self._seed = config.seed if settings.seed is None else settings.seed
        self._encoder = load_encoder(config.student)
        self._variants = ModelVariants(config.student, folders, settings.keep)

    @property
    def models(self) -> list[str]:
        """Return the names of the models, the base first."""
        return self._variants.names

    def read_prompts(self, path: Path) -> list[Prompt]:
        """Return the prompts of a file in any format that `data.prompts` can have.

        Raises:
            UserError: it cannot be read.
        """
        return load_prompts(path, self.config.data.columns, image_folder=self.config.data.image_folder).prompts

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[list[ChatAnswer]]:
        """Yield every model's answers to each prompt.

        Where the weights are not kept, each model answers all prompts before the next one is loaded.

        Raises:
            UserError: the chat template refuses a prompt, or a model cannot be loaded.
        """
        answers = {name: self._answers_of(name, prompts) for name in self.models}
        for index in range(len(prompts)):
            yield [answers[name][index] for name in self.models]

    def _answers_of(self, name: str, prompts: Sequence[Prompt]) -> list[ChatAnswer]:
        sampler = GenerateSampler(self._encoder, self._decoding)
        found = []
        with self._variants.use(name) as model:
            for prompt in prompts:
                seed = seed_from_content("chat", self._seed, prompt.id)
                ((completion,),) = sampler(model, [self._encoder.encode_prompt(prompt)], 1, [seed])
                reply = self._encoder.read_reply(completion.ids)
                found.append(ChatAnswer(name, reply.answer, reply.thinking, not completion.finished))
        return found
