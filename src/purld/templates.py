"""Versioned prompt templates for self-evaluation, rating and judging.

The question keeps its IMAGE marks; texts written by models lose theirs. Changing a text changes what is measured, so
raise its version in the same commit. Runs record the versions.
"""

from __future__ import annotations

from purld.records import IMAGE

SELF_EVALUATION_VERSION = "selfeval-1"
RATING_VERSION = "rating-1"
JUDGE_VERSION = "judge-1"
IN_CONTEXT_VERSION = "incontext-1"

# Appendix C.4: question, reference answer, candidate answer, scalar score. Everything up to the candidate is
# the same for the K+1 evaluations of a group, so the candidate comes last and the prefix is computed once.
SELF_EVALUATION_HEAD = (
    "Rate the candidate answer against the reference answer.\n"
    "Reply with one number between 0.00 and 1.00: 1.00 if the candidate is as good as the reference, "
    "0.00 if it is wrong or useless.\n\n"
    "Question:\n{question}\n\n"
    "Reference Answer:\n{anchor}\n\n"
    "Candidate Answer:\n"
)
SELF_EVALUATION_TAIL = "\n\nScalar Score:"

# The anchor in the context of the question, for scores that are read off likelihoods. Appended to the last user turn.
IN_CONTEXT_TAIL = "\n\nHere is an answer to this:\n{anchor}\n\nWrite the same answer in your own words."

# Self-evaluation without a reference, for the student (self_ppo) or the teacher (teacher_judge_grpo).
RATING_HEAD = (
    "Rate the candidate answer.\n"
    "Reply with one number between 0.00 and 1.00: 1.00 if the candidate answers the question as well as can be, "
    "0.00 if it is wrong or useless.\n\n"
    "Question:\n{question}\n\n"
    "Candidate Answer:\n"
)

# Appendix C.1, Figure C.4.
JUDGE = (
    "You will judge two responses to the same question.\n"
    "Choose the better one overall (correctness, grounding, clarity, completeness).\n"
    "You are given the reference (ground-truth answer) to help judge correctness.\n"
    "Reply with exactly one character:\n"
    "A = Response A is better\n"
    "B = Response B is better\n"
    "T = Tie / too close to call\n\n"
    "=== Question / Prompt ===\n{question}\n\n"
    "=== Reference (Ground Truth) ===\n{reference}\n\n"
    "=== Response A ===\n{answer_a}\n\n"
    "=== Response B ===\n{answer_b}"
)

# Not from the paper: the follow-up to a judge whose reply was none of the three characters.
JUDGE_AGAIN = "Reply with exactly one character and nothing else: A, B or T."


def self_evaluation_turn(question: str, anchor: str, candidate: str) -> str:
    """Return the user turn that asks the student to score `candidate` against `anchor`."""
    # str.format runs once, so braces inside the inserted texts are not treated as fields.
    head = SELF_EVALUATION_HEAD.format(question=question, anchor=without_image_marks(anchor))
    return head + without_image_marks(candidate) + SELF_EVALUATION_TAIL


def rating_turn(question: str, candidate: str) -> str:
    """Return the user turn that asks a model to score `candidate` without a reference."""
    return RATING_HEAD.format(question=question) + without_image_marks(candidate) + SELF_EVALUATION_TAIL


def judge_turn(question: str, reference: str, answer_a: str, answer_b: str) -> str:
    """Return the user turn that asks a judge to choose between two answers."""
    return JUDGE.format(
        question=question,
        reference=without_image_marks(reference),
        answer_a=without_image_marks(answer_a),
        answer_b=without_image_marks(answer_b),
    )


def without_image_marks(text: str) -> str:
    """Replace IMAGE marks in a text that a model wrote by spaces: they do not stand for images."""
    return text.replace(IMAGE, " ")
