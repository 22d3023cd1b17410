"""Parsing the option that an answer chooses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purld.records import Prompt
from purld.tasks.multiple_choice import chosen_option, has_gold, is_correct

COLOURS = ["purple", "red", "blue", "dark red"]


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("red", 1), ("Red.", 1), ("(1) red", 1), ("(1)", 1), ("1", 1), ("1. red", 1), ("B", 1), ("(B)", 1),
        ("B) red", 1),
        ("Option B", 1), ("option B", 1), ("Answer: red", 1), ("The answer is **dark red**.", 3),
        ("**Answer:** (2)", 2), ("Answer:\nblue", 2), ("It reflects dark red light.", 3),
        ("It is not blue. The answer is red\nbecause the case is dark red.", 1),
        ("red or blue", None), ("A dog.", None), ("green", None), ("", None), ("7", None), ("E", None),
        ("I would answer red", 1), ("A-frame", None), ("2.5 metres", None), ("bored", None), ("Answer:", None),
    ],
)  # fmt: skip
def test_an_answer_chooses_one_option_or_none(answer, index):
    assert chosen_option(answer, COLOURS) == index


CITIES = ["London", "Rome", "Paris", "Berlin"]
SETTINGS = ["{}", "Answer: {}", "**Answer:** {}", "The answer is {}.", "The correct option is {}",
            "The correct choice is {}.",
            "Let me think.\nIt is in France.\n{}", "The final answer is {}", "I choose {}.", "It is not A but {}.",
            "First I thought A. Wait, the answer is {}.", "A. London\nB. Rome\nC. Paris\nD. Berlin\n\n{}"]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("label", ["C", "(C)", "**C**", "**(C)**", r"\boxed{C}", r"$\boxed{\text{(C)}}$", "option C"])
def test_a_letter_is_read_in_every_setting_and_form(setting, label):
    assert chosen_option(setting.format(label), CITIES) == 2


@pytest.mark.parametrize(
    ("index", "answers"),
    [
        (2, ["C. Paris", "C) Paris", "C: Paris", "**C. Paris**", '"C"', "“C”", "'C'", "`C`", "[C]", "c", "(c)", "c)",
             r"\boxed{\text{C. Paris}}", r"\boxed{Paris}", "The answer is C because Rome is in Italy.",
             "C, because Rome is not.",
             "C is correct.", "Option C is the right answer.", "Therefore, C.", "I would go with C", "A is wrong. C.",
             "Answer: C\nExplanation: A is in England.", "<answer>C</answer>", "#### C", "It's not London but Paris.",
             "The answer isn't A, it's C.", "It's C.", "It is C", "I would choose C over B.", "Selected: C",
             "Response: C",
             "Among A, B, C and D, the correct one is C.", "答案是C", "选择 C", "正确答案：C",
             r"First \boxed{A}. Corrected: \boxed{C}", "The answer is Paris, the capital.", "The answer is 2."]),
        (0, ["A", "A.", "(A)", "**A**", "A) London", "The answer is A.", "Answer: A",
             "The answer is A because it is."]),
        (None, ["A city in France.", "The answer is a city.", "A big city", "A or B", "Both A and C", "A, C",
                "London or Paris",
                "The answer is A or C.", "E", "The answer is E.", "It has vitamin C in it", "C. London",
                r"\boxed{A, C}", r"\boxed{A} or \boxed{C}", r"\boxed{", "The answer is not C.",
                "A. London\nB. Rome\nC. Paris\nD. Berlin"]),
    ],
)  # fmt: skip
def test_phrasings_of_a_choice(index, answers):
    assert {answer: chosen_option(answer, CITIES) for answer in answers} == dict.fromkeys(answers, index)


def test_an_article_belongs_to_the_option_and_is_no_label():
    animals = ["a cat", "a dog", "no animal", "a dog and a cat"]
    answers = {"A dog.": 1, "The answer is a dog.": 1, "B. a dog": 1, "A. a cat": 0, "It is a dog and a cat": 3}
    assert {answer: chosen_option(answer, animals) for answer in answers} == answers


def test_an_option_that_looks_like_a_label_is_meant_itself():
    counts = ["2", "1", "4", "0"]
    assert chosen_option("2", counts) == 0
    assert chosen_option("(2)", counts) == 2
    assert chosen_option("Answer: 0", counts) == 3


def test_options_without_letters_never_match_an_empty_answer():
    assert chosen_option("", ["<", ">"]) is None
    assert chosen_option("!", ["<", ">"]) is None


def test_gold_is_compared_by_place():
    prompt = Prompt.from_text("q", reference="Answer: red", metadata={"choices": COLOURS})
    assert is_correct(prompt, "(1)") and is_correct(prompt, "B")
    assert not is_correct(prompt, "dark red")


@pytest.mark.parametrize(
    "fields",
    [
        {"reference": "red"},
        {"metadata": {"choices": COLOURS}},
        {"reference": "green", "metadata": {"choices": COLOURS}},
        {"reference": "red", "metadata": {"choices": "red"}},
    ],
)
def test_without_gold_an_answer_is_not_wrong_but_unscored(fields):
    prompt = Prompt.from_text("q", **fields)
    assert not has_gold(prompt)
    with pytest.raises(ValueError, match="one of its choices"):
        is_correct(prompt, "red")


@given(answer=st.text(max_size=40), options=st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_whatever_is_said_it_names_one_of_the_options_or_none(answer, options):
    index = chosen_option(answer, options)
    assert index is None or 0 <= index < len(options)


@pytest.mark.parametrize(
    "answer",
    ["La respuesta correcta es la opción C.", "Die Antwort lautet C, weil A falsch ist.", "Die richtige Antwort ist C.",
     "La bonne réponse est C, et non A.", "Réponse : C", "A resposta correta é a letra C.", "La risposta corretta è C.",
     "Правильный ответ: C", "Het juiste antwoord is C.", "Wybieram odpowiedź C.", "Doğru cevap C.", "Svaret är C.",
     "Đáp án đúng là C.", "Jawaban: C", "正解はCです。", "答え：C", "選択肢Cが正しい。",
     "정답은 C입니다.", "الإجابة الصحيحة هي C",
     "因此，正确答案是C。", "故选：C", "正确答案不是A，而是C。",
     "정답은 A가 아닙니다. 정답은 C입니다.", "（C）", "Ans: C", "Correct: C",
     "Die Antwort ist C. Antwort A ist falsch.", "La respuesta es C. La opción A es incorrecta."],
)  # fmt: skip
def test_a_statement_is_read_in_many_languages(answer):
    assert chosen_option(answer, CITIES) == 2


@pytest.mark.parametrize(
    "answer",
    ["La respuesta no es C.", "Die Antwort ist nicht C.", "La réponse n'est pas C.", "Ответ: не C", "答えはCではない。",
     "정답은 C가 아닙니다.", "答案不是C", "Cは間違い。"],
)  # fmt: skip
def test_a_denial_chooses_nothing_in_any_language(answer):
    assert chosen_option(answer, CITIES) is None
