"""Stage I: maximum likelihood on the teacher's answers (Eq. 1), by TRL's SFTTrainer.

The loss covers the answer alone. A share of the anchors, picked by content hash, is held out for validation, and the
checkpoint with the lowest validation loss becomes p_sft. The learning rate is not tuned here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from purld import ranks
from purld.config.schema import Sft
from purld.errors import UserError
from purld.model.at_once import AtOnce
from purld.model.body_and_head import body_states_at
from purld.model.causal_lm import CausalLM, model_device
from purld.model.encode import Encoder, next_token_targets, training_batch
from purld.model.load import load_model, make_trainable, save_model
from purld.model.log_probs import micro_batches
from purld.model.out_of_memory import is_out_of_memory
from purld.model.sample import seed_from_content, seeded_torch
from purld.model.shard import divides_gradients
from purld.model.turn_end import measure_turn_end
from purld.model.vision import EncodedPrompt
from purld.model.whole_weights import whole_weights
from purld.records import Anchor, Prompt, content_hash
from purld.training.checkpoints import (
    ModelNamedCheckpoints,
    RunCallback,
    device_arguments,
    device_autocast,
    make_arguments,
    resume_point,
)
from purld.training.context import StageContext
from purld.training.finite import FiniteGuard
from purld.training.memory import divided_memory_error, form_of_fine_tuning
from purld.training.schedule import NoIdleSteps
from purld.training.trackers import tracker_arguments

TrainingExample = tuple[EncodedPrompt, list[int]]  # a prompt and the token ids of its answer

_LOGGED = frozenset({"loss", "eval_loss", "learning_rate", "grad_norm", "epoch"})


@dataclass(frozen=True)
class SftFacts:
    """The facts of Stage I that the manifest keeps."""

    trained_on: int
    validated_on: int
    anchors_cut: int
    best_step: int
    steps: int
    warnings: Sequence[str] = ()


def fine_tune(context: StageContext, settings: Sft, examples: Sequence[tuple[Prompt, Anchor]]) -> SftFacts:
    """Fine-tune p_base on the anchors and save p_sft to `run.sft`; resume from the last complete checkpoint.

    Raises:
        UserError: no anchors are left to train on, or a loss, gradient or weight is not finite.
    """
    student, encoder, run = context.student, context.encoder, context.run
    train, held_out, cut = _encode_examples(examples, encoder, settings.validation_fraction)
    if not train:
        raise UserError("Stage I: there are no anchors to train on.")
    checkpoint = resume_point(run, "sft")
    model = make_trainable(student, load_model(student, student.model), context.seed)
    longest = max(len(prompt) + len(answer) for prompt, answer in (*train, *held_out))
    half = student.dtype != "float32" or device_arguments()["bf16"]
    form = form_of_fine_tuning(settings, cast(nn.Module, model), longest, half)
    guard = FiniteGuard("Stage I", "sft.learning_rate", settings.learning_rate, run.checkpoints("sft"))
    trainer = _SftTrainer(
        model=cast(PreTrainedModel, model),  # or one under adapters
        args=_arguments(
            settings,
            str(run.checkpoints("sft")),
            len(train),
            context.seed,
            validate=bool(held_out),
            recompute=form.recompute,
            reporting=tracker_arguments(context.report_to, run, "sft"),
        ),
        train_dataset=_indices(len(train)),
        eval_dataset=_indices(len(held_out)) if held_out else None,
        processing_class=encoder.tokenizer,
        data_collator=lambda rows: {"examples": [row["index"] for row in rows]},
        callbacks=[guard, RunCallback(run, "sft", _LOGGED.__contains__, context.progress)],
    )
    trainer.prepare(train, held_out, encoder.pad, form.micro_batch, guard, divides_gradients(student))
    trainer.train_from(checkpoint.path)
    guard.check_weights(trainer.model.named_parameters(), trainer.state)
    guard.check_result(_final_loss(trainer.model, train[:1], encoder.pad), trainer.state)
    model.config.use_cache = True
    whole = whole_weights(trainer.model)
    ranks.on_first(lambda: save_model(student, trainer.model, encoder, run.sft, whole))
    best = trainer.state.best_global_step or trainer.state.global_step
    with device_autocast():
        turn_end = measure_turn_end(cast(CausalLM, trainer.model), encoder, [*held_out, *train])
    warnings = [turn_end.warning] if turn_end and turn_end.warning else []
    return SftFacts(len(train), len(held_out), cut, best, trainer.state.global_step, warnings)


class _SftTrainer(NoIdleSteps, ModelNamedCheckpoints, SFTTrainer):
    """TRL's trainer, whose step divides a whole batch among the ranks and, in each, into micro-batches.

    Every token weighs the same, so that neither the number of ranks nor the size of a micro-batch changes the gradient.
    Checkpoints can be loaded again, and losses that are not finite stop it.
    """

    def prepare(
        self,
        train: Sequence[TrainingExample],
        held_out: Sequence[TrainingExample],
        pad: int,
        micro_batch_size: int,
        guard: FiniteGuard,
        divides: bool,
    ) -> None:
        """Take the examples whose indices the trainer shuffles, and what else a step needs."""
        self._train, self._held_out, self._pad = train, held_out, pad
        too_large = "for Stage I, even for one answer at a time; lower student.max_anchor_tokens, or train less"
        self._at_once = AtOnce(micro_batch_size, "Stage I's micro-batches are smaller", f"{too_large} (student.lora)")
        self._guard, self._divides_gradients = guard, divides
        self.remove_callback(PrinterCallback)
        # TRL's loss divides by the token count itself. Some image models say they do not take the count, and then
        # every micro-batch would weigh the same, whatever its number of tokens.
        self.model_accepts_loss_kwargs = True

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the gradient of one batch, summed over the ranks, and return its loss."""
        examples = [self._train[index] for index in inputs["examples"]]
        tokens = sum(len(answer) for _, answer in examples)
        mine = examples[ranks.my_share(len(examples))]

        def add_gradient(size: int) -> Tensor:
            model.zero_grad()  # what an attempt that ran out of memory has left
            # What the loss of a mixture of experts is averaged over, apart from tokens.
            self.current_gradient_accumulation_steps = ranks.count() * math.ceil(len(examples) / ranks.count() / size)
            loss = torch.zeros((), device=self.args.device)
            for rows in micro_batches(len(mine), size):
                batch = training_batch(mine[rows], self._pad)
                loss += super(_SftTrainer, self).training_step(model, batch, num_items_in_batch=tokens)  # type: ignore[no-untyped-call]
            return loss

        with self._own_dropout():
            loss = self._at_once(self._begun_again(add_gradient), math.ceil(len(examples) / ranks.count()))
        ranks.sum_gradients(model.parameters())
        self._guard.check_loss(ranks.sum_tensor(loss), self.state)
        return loss

    def _begun_again(self, work: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """Return work that may run out of memory and begin again; in ranks that divide gradients it ends the stage."""

        def once(size: int) -> Tensor:
            try:
                return work(size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # Other ranks have added their gradients to what is here.
                raise divided_memory_error(
                    "Stage I", self.state.global_step + 1, "lower sft.micro_batch_size"
                ) from None

        return once if self._divides_gradients else work

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return TRL's loss of a micro-batch, from the logits of its answers' tokens alone.

        Without Triton, TRL makes logits of the prompts' tokens too, which takes most of the time of a small model with
        a large vocabulary.
        """
        positions, targets = next_token_targets(inputs["labels"])
        others = {name: value for name, value in inputs.items() if name != "labels"}
        with body_states_at(self.model, positions):
            return super().compute_loss(  # type: ignore[no-untyped-call]
                model, others | {"shift_labels": targets.unsqueeze(0)}, return_outputs, num_items_in_batch
            )

    def _own_dropout(self) -> AbstractContextManager[None]:
        """Give a rank random numbers of its own for the step; the state that checkpoints keep is that of all ranks."""
        if ranks.count() == 1:
            return contextlib.nullcontext()
        return seeded_torch(seed_from_content("dropout", self.args.seed, self.state.global_step, ranks.index()))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the validation loss, in nats per token."""
        self.model.eval()
        mine = self._held_out[ranks.my_share(len(self._held_out))]
        total = self._at_once(lambda size: self._sum_losses(mine, size), len(mine))
        metrics = {"eval_loss": ranks.sum_tensor(total).item() / sum(len(answer) for _, answer in self._held_out)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sum_losses(self, examples: Sequence[TrainingExample], size: int) -> Tensor:
        """Return the sum over tokens of the loss of some examples, so many at a time."""
        total = torch.zeros((), device=self.args.device)
        for rows in micro_batches(len(examples), size):
            batch = training_batch(examples[rows], self._pad)
            loss, _, _ = self.prediction_step(self.model, batch, prediction_loss_only=True)
            total += loss * sum(len(answer) for _, answer in examples[rows])
        return total

    def train_from(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint or from the start; from one of the last step only load the model that is kept."""
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self.state = state  # `train` would take a step before it sees that it is done
        best = state.best_global_step or state.global_step
        self._load_from_checkpoint(str(checkpoint.with_name(f"checkpoint-{best}")))


@torch.no_grad()
def _final_loss(model: Any, examples: Sequence[TrainingExample], pad: int) -> Tensor:
    """Return the loss of the trained model on some examples, without dropout."""
    model.eval()
    batch = {name: value.to(model_device(model)) for name, value in training_batch(examples, pad).items()}
    with device_autocast():
        loss: Tensor = model(**batch).loss
    return loss


def in_validation_part(prompt: Prompt, fraction: float) -> bool:
    """Return whether a prompt is held out for validation, by the hash of its content and not by its position."""
    return int(content_hash(["validation", prompt.id]), 16) / 16**16 < fraction


def _encode_examples(
    examples: Sequence[tuple[Prompt, Anchor]], encoder: Encoder, fraction: float
) -> tuple[list[TrainingExample], list[TrainingExample], int]:
    """Encode the examples to train on and those to validate on, and count the anchors that were cut."""
    train: list[TrainingExample] = []
    held_out: list[TrainingExample] = []
    cut = 0
    for prompt, anchor in examples:
        answer = encoder.encode_target(anchor.text, anchor.cut)
        cut += answer.cut
        (held_out if in_validation_part(prompt, fraction) else train).append(
            (encoder.encode_prompt(prompt), answer.ids)
        )
    if not train:  # the few prompts of a small pool may all be held out
        train, held_out = held_out, []
    return train, held_out, cut


def _indices(count: int) -> Dataset:
    """Make the dataset that the trainer shuffles: the examples' indices."""
    return Dataset.from_dict({"index": list(range(count))})


def _arguments(
    settings: Sft, folder: str, rows: int, seed: int, validate: bool, recompute: bool, reporting: dict[str, Any]
) -> SFTConfig:
    steps = math.ceil(math.ceil(rows / settings.batch_size) * settings.epochs)
    every = min(settings.checkpoint_steps, steps)
    return make_arguments(
        SFTConfig,
        output_dir=folder,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        weight_decay=0.0,
        per_device_train_batch_size=settings.batch_size,  # a step divides it
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        logging_steps=max(1, steps // 100),
        save_steps=every,
        eval_strategy="steps" if validate else "no",
        eval_steps=every,
        load_best_model_at_end=validate,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        gradient_checkpointing=recompute,
        seed=seed,
        **reporting,
    )
