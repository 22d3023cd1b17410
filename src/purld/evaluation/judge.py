"""Which of two answers a judge prefers: the protocol of appendix C.1, Figure C.4.

The judge sees the question, the reference and both answers, and replies A, B or T. Every pair is judged in
both orders unless the paper's single order is asked for. A judge that says anything else is shown its own
reply and reminded of the three characters, within limits; what is no verdict even then is "unjudged": kept
with its raw words and counted, never taken for a tie or a loss. Asking, caching and what it costs are the
client's; turning verdicts into rates is `winrate`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from purld.clients.base import Client, OnReply, Reply
from purld.records import Generation, Message, Outcome, Prompt, Verdict, content_hash
from purld.templates import JUDGE_AGAIN, judge_turn, without_image_marks

NO_REFERENCE = "(none given)"
ASKED_AGAIN = "\n(asked again)\n"  # between the replies in a verdict's raw words

Progress = Callable[[int, int, str], None]
"""Called with what is done, the total, and a short note."""

_WIN_PROBABILITY: Mapping[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True)
class JudgePreferences:
    """What the verdicts on one model say.

    Attributes:
        wins: per prompt id the mean probability of winning over samples and orders, a tie being half; None if
            none of its verdicts was judged.
        unjudged: how many verdicts were not.
        flip_rate: among the answers that a judge saw and judged in both orders, the share whose outcome changed
            with the order; None if there is none. Equal answers, which tie unasked, would flatter the judge.
        asked_again: how many verdicts took more than one question, judged in the end or not.
    """

    wins: Mapping[str, float | None]
    unjudged: int
    flip_rate: float | None
    asked_again: int


@dataclass(frozen=True)
class _Pairing:
    """One question to the judge: an answer against the opponent's, in one order."""

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
    """Ask a judge about every answer.

    Two answers that are the same text tie without being sent, and an answer whose opponent is missing is
    unjudged. With one order, which answer is A depends on the content alone, and not on which side is the
    model: swapping the two asks the same question.

    Args:
        prompts: the questions; their images go to the judge along with the words.
        generations: the model's answers, any number per prompt.
        opponents: the opponent's answer by prompt id.
        client: the judge.
        both_orders: judge each pair twice, with either answer as A.
        retries: how often a judge whose reply is no verdict is asked again. The reply is part of the next
            question, so the ledger takes it for a new one, and a resumed run finds both again.
        progress: told of every reply as soon as it is durable.

    Returns:
        For each answer its verdicts, in the order of `generations`, the one with the model as A first.

    Raises:
        KeyError: an answer belongs to none of the prompts.
    """
    known: dict[tuple[str, int], list[Verdict]] = {}
    for generation in generations:
        opponent = opponents.get(generation.prompt_id)
        if opponent is None or opponent == generation.text:
            orders = _orders(generation, opponent, both_orders)
            known[generation.prompt_id, generation.sample] = [_unasked(generation, opponent, o) for o in orders]

    pairings = _pairings(prompts, generations, opponents, both_orders)
    replies = _ask(client, [pairing.question for pairing in pairings], retries, progress)
    for pairing, said in zip(pairings, replies, strict=True):
        key = pairing.generation.prompt_id, pairing.generation.sample
        known.setdefault(key, []).append(_verdict(pairing, said))
    return [verdict for g in generations for verdict in known[g.prompt_id, g.sample]]


def judge_questions(
    prompts: Sequence[Prompt],
    generations: Sequence[Generation],
    opponents: Mapping[str, str],
    both_orders: bool = True,
) -> list[Prompt]:
    """What `judge_answers` asks at first, in its order: for judges that are people, or not on this network."""
    return [pairing.question for pairing in _pairings(prompts, generations, opponents, both_orders)]


def _ask(
    client: Client, questions: Sequence[Prompt], retries: int, progress: Progress | None
) -> Sequence[Sequence[Reply]]:
    """The replies to every question: one, or more while the last was no verdict and retries are left."""
    said: list[list[Reply]] = [[] for _ in questions]
    undecided = list(range(len(questions)))
    for attempt in range(retries + 1):
        asked = [_repeated(questions[i], said[i]) for i in undecided]
        on_reply = _counter(len(asked), "asked again" if attempt else "", progress)
        for i, reply in zip(undecided, client.ask(asked, on_reply), strict=True):
            said[i].append(reply)
        # No text is a failed or a lost call, which the client has dealt with.
        undecided = [i for i in undecided if (text := said[i][-1].text) is not None and _letter(text) is None]
        if not undecided:
            break
    return said


def _repeated(question: Prompt, said: Sequence[Reply]) -> Prompt:
    """The question with what the judge made of it so far, and a reminder of what was asked for."""
    turns = [
        m
        for reply in said
        for m in (Message("assistant", without_image_marks(reply.text or "")), Message("user", JUDGE_AGAIN))
    ]
    return replace(question, messages=(*question.messages, *turns))


def _counter(total: int, note: str, progress: Progress | None) -> OnReply | None:
    if progress is None:
        return None
    answered = 0

    def on_reply(place: int, reply: Reply) -> None:
        nonlocal answered
        answered += 1
        progress(answered, total, note)

    return on_reply


def average_preferences(verdicts: Sequence[Verdict]) -> JudgePreferences:
    """Average verdicts over the orders and samples of each prompt."""
    by_answer: dict[tuple[str, int], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_answer[verdict.prompt_id, verdict.sample].append(verdict)

    by_prompt: dict[str, list[float]] = {verdict.prompt_id: [] for verdict in verdicts}
    flips: list[bool] = []
    for (prompt_id, _), of_answer in by_answer.items():
        judged = [v for v in of_answer if v.outcome != "unjudged"]
        if judged:
            by_prompt[prompt_id].append(sum(_WIN_PROBABILITY[v.outcome] for v in judged) / len(judged))
        if len({v.model_is_a for v in judged if v.asked}) == 2:
            flips.append(len({v.outcome for v in judged}) > 1)
    return JudgePreferences(
        wins={prompt_id: sum(p) / len(p) if p else None for prompt_id, p in by_prompt.items()},
        unjudged=sum(v.outcome == "unjudged" for v in verdicts),
        flip_rate=sum(flips) / len(flips) if flips else None,
        asked_again=sum(v.asked > 1 for v in verdicts),
    )


def _orders(generation: Generation, opponent: str | None, both_orders: bool) -> list[bool]:
    """For each verdict to obtain, whether the model's answer is A."""
    if both_orders:
        return [True, False]
    first, second = sorted([generation.text, opponent or ""])
    coin = int(content_hash([generation.prompt_id, first, second]), 16) % 2 == 0
    return [(generation.text == first) == coin]


def _unasked(generation: Generation, opponent: str | None, model_is_a: bool) -> Verdict:
    outcome: Outcome = "unjudged" if opponent is None else "tie"
    raw = "(not asked: no opponent's answer)" if opponent is None else "(not asked: the answers are the same)"
    return Verdict(generation.prompt_id, generation.sample, outcome, raw, model_is_a, asked=0)


def _pairings(
    prompts: Sequence[Prompt], generations: Sequence[Generation], opponents: Mapping[str, str], both_orders: bool
) -> list[_Pairing]:
    """The questions to the judge: all orders of every answer that differs from its opponent's."""
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


def _verdict(pairing: _Pairing, said: Sequence[Reply]) -> Verdict:
    """What the last reply means; the raw words are all of them."""
    generation, last = pairing.generation, said[-1].text
    raw = ASKED_AGAIN.join(f"({r.state}: {r.detail})" if r.text is None else r.text for r in said)
    outcome = _outcome(None if last is None else _letter(last), pairing.model_is_a)
    return Verdict(generation.prompt_id, generation.sample, outcome, raw, pairing.model_is_a, asked=len(said))


def _letter(text: str) -> str | None:
    """The verdict in a reply, free of its wrapping; None if it is none."""
    letter = text.strip().strip("*.").strip()
    return letter if letter in ("A", "B", "T") else None


def _outcome(letter: str | None, model_is_a: bool) -> Outcome:
    match letter:
        case None:
            return "unjudged"
        case "T":
            return "tie"
        case _:
            return "win" if (letter == "A") == model_is_a else "loss"
