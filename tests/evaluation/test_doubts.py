"""What puts a result in doubt is said; what does not is not."""

import pytest

from purld.config.schema import Evaluate
from purld.evaluation.doubts import result_doubts

SOUND = {
    "models": {"base": {}, "sft": {"flip_rate": 0.2}, "ldl_grpo": {"flip_rate": 0.5}},
    "score_quality": {"auc_within": 0.8, "auc_within_ci": [0.6, 0.9]},
}
MOVED = {"base": ["a", "b"], "sft": ["a", "c"], "ldl_grpo": ["d", "c"]}


def doubts(answers=MOVED, **results):
    return result_doubts(SOUND | results, answers, "greedy answers", Evaluate(samples=4, max_new_tokens=48))


def test_a_sound_result_has_no_doubts():
    assert doubts() == []
    assert (
        result_doubts({"models": {"base": {}, "sft": {}}}, {"base": [], "sft": []}, "drawn answers", Evaluate()) == []
    )


@pytest.mark.parametrize(
    ("unmoved", "words"),
    [
        ({"sft": ["a", "b"]}, "all 2 greedy answers of sft to held-out prompts are word for word those of base"),
        ({"ldl_grpo": ["a", "c"]}, "of ldl_grpo to held-out prompts are word for word those of sft"),
    ],
)
def test_a_model_that_answers_as_before_is_named_with_the_keys_to_change(unmoved, words):
    (sentence,) = doubts(MOVED | unmoved)
    assert words in sentence
    assert ("sft.learning_rate" if "sft" in unmoved else "align.learning_rate") in sentence


def test_models_whose_answers_are_cut_off_are_named_and_the_base_is_not():
    models = {name: {"n": 10, "unfinished": cut} for name, cut in {"base": 40, "sft": 38, "ldl_grpo": 4}.items()}
    (sentence,) = doubts(models=models)
    assert "cut off at evaluate.max_new_tokens=48 (sft 95%) and are" in sentence


def test_a_judge_that_always_says_a_is_named():
    (sentence,) = doubts(models={"base": {}, "sft": {"flip_rate": 1.0}, "ldl_grpo": {"flip_rate": 0.4}})
    assert "(sft 100%)" in sentence


@pytest.mark.parametrize(
    "auc, interval, said",
    [
        (0.5, [0.4, 0.6], "cannot be told apart from chance: AUC within prompts 0.50 [0.40, 0.60]"),
        (1.0, [0.16, 1.0], "cannot be told apart from chance: AUC within prompts 1.00 [0.16, 1.00]"),  # too few groups
        (0.3, [0.2, 0.45], "ranked worse than chance: AUC within prompts 0.30 [0.20, 0.45]"),
    ],
)
def test_scores_that_are_not_shown_to_beat_chance_are_named(auc, interval, said):
    (sentence,) = doubts(score_quality={"auc_within": auc, "auc_within_ci": interval})
    assert said in sentence
