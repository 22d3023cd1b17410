"""Ask a judge which of two answers it prefers (appendix C.1, Figure C.4).

The judge sees the question, the reference and both answers, and replies A, B or T, after any thinking. Every pair is
judged in both orders, unless the configuration asks for the paper's single order. A judge that replies anything else is
shown its own reply and reminded of the three characters, up to `retries` times. A reply that is still no verdict is
"unjudged": it is kept with its raw text and counted, and is neither a tie nor a loss. The client sends, caches and pays
for the calls; `winrate` turns verdicts into rates.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from purld.clients.base import Client, OnReply, Reply
from purld.records import Generation, Message, Outcome, Prompt, Verdict, content_hash
from purld.templates import JUDGE_AGAIN, judge_turn, without_image_marks
from purld.thinking import split_thinking

NO_REFERENCE = "(none given)"
ASKED_AGAIN = "\n(asked again)\n"  # separates the replies in `Verdict.raw`

Progress = Callable[[int, int, str], None]
"""Called with (done, total, short note)."""

_WIN_PROBABILITY: Mapping[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True)
class JudgePreferences:
    """The average of a judge's verdicts on one model.

    Attributes:
        wins: by prompt id, the mean probability of winning over samples and orders, where a tie counts half; None if
            no verdict on the prompt was judged.
        unjudged: number of unjudged verdicts.
        reasons: how many of them have each `Verdict.reason`.
        flip_rate: the share of answers whose outcome changed with the order, among those that the judge was asked
            about and judged in both orders; None if there are none. Identical answers, which tie without being sent,
            are left out, because they would flatter the judge.
        asked_again: number of verdicts that took more than one question, judged in the end or not.
        thinking: number of verdicts whose reply has thinking, which is not read as part of the verdict.
    """

    wins: Mapping[str, float | None]
    unjudged: int
    flip_rate: float | None
    asked_again: int
    thinking: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pairing:
    """One question to the judge: an answer and the opponent's, in one order."""

    generation: Generation
    question: Prompt
    model_is_a: bool


def judge_answers(
    prompts: Sequence[Prompt],
    generations: Sequence[Generation],
    opponents: Mapping[str, str],
    client: Client,
    both_orders: bool = True,
    retries: int = 1,
    progress: Progress | None = None,
) -> list[Verdict]:
    """Ask a judge about every answer and return its verdicts.

    Identical answers tie without being sent, and an answer without an opponent's answer is unjudged. With a single
    order, the content alone decides which answer is A: exchanging model and opponent gives the same question.

    Args:
        prompts: the questions; their images are sent to the judge along with the text.
        generations: the model's answers, any number per prompt.
        opponents: the opponent's answer by prompt id.
        client: the judge.
        both_orders: judge each pair twice, once with either answer as A.
        retries: how often the judge is asked again after a reply that is no verdict. The reply is part of the next
            question, so the ledger books it as a new request, and a resumed run finds both.
        progress: called after every reply, as soon as it is durable.

    Returns:
        The verdicts in the order of `generations`; of each answer, the one with the model as A comes first.

    Raises:
        KeyError: an answer belongs to none of the prompts.
    """
    by_answer: dict[tuple[str, int], list[Verdict]] = {}
    for generation in generations:
        opponent = opponents.get(generation.prompt_id)
        if opponent is None or opponent == generation.text:
            orders = _orders(generation, opponent, both_orders)
            by_answer[generation.prompt_id, generation.sample] = [_unasked(generation, opponent, o) for o in orders]

    pairings = _pairings(prompts, generations, opponents, both_orders)
    replies = _ask_until_decided(client, [pairing.question for pairing in pairings], retries, progress)
    for pairing, of_pairing in zip(pairings, replies, strict=True):
        key = pairing.generation.prompt_id, pairing.generation.sample
        by_answer.setdefault(key, []).append(_verdict(pairing, of_pairing))
    return [verdict for g in generations for verdict in by_answer[g.prompt_id, g.sample]]


def judge_questions(
    prompts: Sequence[Prompt],
    generations: Sequence[Generation],
    opponents: Mapping[str, str],
    both_orders: bool = True,
) -> list[Prompt]:
    """Return the first questions that `judge_answers` asks, in its order, for a judge that answers in a file."""
    return [pairing.question for pairing in _pairings(prompts, generations, opponents, both_orders)]


def _ask_until_decided(
    client: Client, questions: Sequence[Prompt], retries: int, progress: Progress | None
) -> Sequence[Sequence[Reply]]:
    """Return all replies to each question: more than one if a reply was no verdict and retries were left."""
    replies: list[list[Reply]] = [[] for _ in questions]
    undecided = list(range(len(questions)))
    for attempt in range(retries + 1):
        asked = [_repeated_question(questions[i], replies[i]) for i in undecided]
        on_reply = _reply_counter(len(asked), "asked again" if attempt else "", progress)
        for i, reply in zip(undecided, client.ask(asked, on_reply), strict=True):
            replies[i].append(reply)
        # A reply without text is a failed or lost call, which the client has already retried.
        undecided = [i for i in undecided if (text := replies[i][-1].text) is not None and _letter(text) is None]
        if not undecided:
            break
    return replies


def _repeated_question(question: Prompt, replies: Sequence[Reply]) -> Prompt:
    """Return the question followed by the judge's replies so far, each with a reminder of the three characters."""
    turns = [
        message
        for reply in replies
        for message in (Message("assistant", _quoted_reply(reply)), Message("user", JUDGE_AGAIN))
    ]
    return replace(question, messages=(*question.messages, *turns))


def _quoted_reply(reply: Reply) -> str:
    return without_image_marks(split_thinking(reply.text or "").answer) or "(no answer)"


def _reply_counter(total: int, note: str, progress: Progress | None) -> OnReply | None:
    if progress is None:
        return None
    answered = 0

    def on_reply(index: int, reply: Reply) -> None:
        nonlocal answered
        answered += 1
        progress(answered, total, note)

    return on_reply


def average_preferences(verdicts: Sequence[Verdict]) -> JudgePreferences:
    """Return the verdicts averaged over the orders and samples of each prompt."""
    by_answer: dict[tuple[str, int], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_answer[verdict.prompt_id, verdict.sample].append(verdict)

    by_prompt: dict[str, list[float]] = {verdict.prompt_id: [] for verdict in verdicts}
    flips: list[bool] = []
    for (prompt_id, _), on_answer in by_answer.items():
        judged = [v for v in on_answer if v.outcome != "unjudged"]
        if judged:
            by_prompt[prompt_id].append(sum(_WIN_PROBABILITY[v.outcome] for v in judged) / len(judged))
        if len({v.model_is_a for v in judged if v.asked}) == 2:
            flips.append(len({v.outcome for v in judged}) > 1)
    return JudgePreferences(
        wins={prompt_id: sum(p) / len(p) if p else None for prompt_id, p in by_prompt.items()},
        unjudged=sum(v.outcome == "unjudged" for v in verdicts),
        flip_rate=sum(flips) / len(flips) if flips else None,
        asked_again=sum(v.asked > 1 for v in verdicts),
        thinking=sum(split_thinking(v.raw).found for v in verdicts),
        # Verdicts of older versions have no reason; nearly all of theirs are replies that were no verdict.
        reasons=Counter(v.reason or "no_verdict" for v in verdicts if v.outcome == "unjudged"),
    )


def _orders(generation: Generation, opponent: str | None, both_orders: bool) -> list[bool]:
    """Return one entry per question to ask: whether the model's answer is A."""
    if both_orders:
        return [True, False]
    first, second = sorted([generation.text, opponent or ""])
    first_is_a = int(content_hash([generation.prompt_id, first, second]), 16) % 2 == 0
    return [(generation.text == first) == first_is_a]


def _unasked(generation: Generation, opponent: str | None, model_is_a: bool) -> Verdict:
    prompt_id, sample = generation.prompt_id, generation.sample
    if opponent is None:
        raw = "(not asked: no opponent's answer)"
        return Verdict(prompt_id, sample, "unjudged", raw, model_is_a, asked=0, reason="no_opponent")
    return Verdict(prompt_id, sample, "tie", "(not asked: the answers are the same)", model_is_a, asked=0)


def _pairings(
    prompts: Sequence[Prompt], generations: Sequence[Generation], opponents: Mapping[str, str], both_orders: bool
) -> list[_Pairing]:
    """Return the questions to the judge: all orders of every answer that differs from the opponent's."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return [
        _pairing(by_id[generation.prompt_id], generation, opponent, order)
        for generation in generations
        if (opponent := opponents.get(generation.prompt_id)) is not None and opponent != generation.text
        for order in _orders(generation, opponent, both_orders)
    ]


def _pairing(prompt: Prompt, generation: Generation, opponent: str, model_is_a: bool) -> _Pairing:
    answer_a, answer_b = (generation.text, opponent) if model_is_a else (opponent, generation.text)
    reference = NO_REFERENCE if prompt.reference is None else prompt.reference
    text = judge_turn(prompt.question, reference, answer_a, answer_b)
    return _Pairing(generation, Prompt.from_text(text, images=prompt.images), model_is_a)


def _verdict(pairing: _Pairing, replies: Sequence[Reply]) -> Verdict:
    """Return the verdict of the last reply; `raw` holds all replies."""
    generation, last = pairing.generation, replies[-1]
    raw = ASKED_AGAIN.join(f"({r.state}: {r.detail})" if r.text is None else r.text for r in replies)
    outcome = _outcome(None if last.text is None else _letter(last.text), pairing.model_is_a)
    reason = ""
    if outcome == "unjudged":
        reason = last.cap or ("no_reply" if last.text is None else "no_verdict")
    asked = len(replies)
    return Verdict(generation.prompt_id, generation.sample, outcome, raw, pairing.model_is_a, asked, reason)


def _letter(text: str) -> str | None:
    """Return the letter of a reply without thinking, white space and markup; None if the reply is no verdict."""
    letter = split_thinking(text).answer.strip().strip("*.").strip()
    return letter if letter in ("A", "B", "T") else None


def _outcome(letter: str | None, model_is_a: bool) -> Outcome:
    match letter:
        case None:
            return "unjudged"
        case "T":
            return "tie"
        case _:
            return "win" if (letter == "A") == model_is_a else "loss"
