"""Scores against values worked out by hand."""

import random

import pytest

from loradock_train.task_metrics import (
    best_constant,
    class_scores,
    classification,
    confusion_matrix,
    exact_match,
    longest_common,
    rouge_l,
    rouge_n,
    rouge_tokens,
    token_f1,
)


def test_rouge_tokens_are_lower_case_letters_and_digits() -> None:
    assert rouge_tokens("The cat's 2nd mat — naïve_one") == ["the", "cat", "s", "2nd", "mat", "na", "ve", "one"]


def test_rouge_1_counts_a_word_as_often_as_it_is_in_both() -> None:
    # truth: the x2, cat, sat, on, mat (6); answer: the x3, cat (4); common: the x2, cat = 3
    assert rouge_n("the cat sat on the mat", "the the the cat", 1) == pytest.approx(2 * 3 / (6 + 4))


def test_rouge_2_takes_pairs() -> None:
    # truth pairs: the-cat cat-sat sat-on on-the the-mat (5); answer: the-cat cat-on on-the the-mat (4); common 3
    assert rouge_n("the cat sat on the mat", "the cat on the mat", 2) == pytest.approx(2 * 3 / (5 + 4))


def test_rouge_l_is_of_the_longest_common_subsequence() -> None:
    # Lin 2004, section 3: "police killed the gunman" and "police kill the gunman" share police, the, gunman.
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)


def test_rouge_of_nothing_is_nothing() -> None:
    assert rouge_l("words", "") == 0.0
    assert rouge_n("word", "word", 2) == 0.0, "a single word has no pair"


def test_longest_common_by_bits_equals_the_table() -> None:
    chance = random.Random(3)

    def by_table(one: list[str], other: list[str]) -> int:
        before = [0] * (len(other) + 1)
        for a in one:
            row = [0]
            for place, b in enumerate(other):
                row.append(before[place] + 1 if a == b else max(before[place + 1], row[place]))
            before = row
        return before[-1]

    for _ in range(200):
        one, other = ([chance.choice("abcd") for _ in range(chance.randrange(12))] for _ in range(2))
        assert longest_common(one, other) == by_table(one, other)


def test_exact_match_minds_case_but_not_outer_space() -> None:
    assert exact_match("Yes.", " Yes.\n") == 1.0
    assert exact_match("Yes.", "yes.") == 0.0


def test_token_f1_is_of_words_without_order() -> None:
    # truth 3 words, answer 4, common: blue, car
    assert token_f1("the blue car", "Car, Blue! or red") == pytest.approx(2 * 2 / (3 + 4))
    assert token_f1("", "") == 1.0
    assert token_f1("", "x") == 0.0


LABELS = ("cat", "dog", "cow")
TRUTHS = ["cat", "cat", "cat", "dog", "dog"]
ANSWERS = ["cat", "cat", "dog", "dog", "cat"]


def test_confusion_matrix_has_truth_in_rows() -> None:
    assert confusion_matrix(TRUTHS, ANSWERS, LABELS) == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_class_scores_by_hand() -> None:
    scores = class_scores(confusion_matrix(TRUTHS, ANSWERS, LABELS), LABELS)
    assert scores["cat"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert scores["dog"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2})
    assert scores["cow"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_macro_f1_leaves_out_classes_that_occur_nowhere() -> None:
    assert classification(TRUTHS, ANSWERS, LABELS) == pytest.approx(
        {"accuracy": 3 / 5, "macro_f1": (2 / 3 + 1 / 2) / 2}
    )
    wrong = classification(["cat"], ["cow"], LABELS)
    assert wrong == {"accuracy": 0.0, "macro_f1": 0.0}


def test_best_constant_answer_is_the_commonest_class() -> None:
    assert best_constant("classification", TRUTHS, LABELS, "accuracy") == pytest.approx(
        {"answer": "cat", "accuracy": 3 / 5, "macro_f1": (2 * 3 / 8) / 2}
    )


def test_best_constant_summary_is_the_one_nearest_to_all() -> None:
    truths = ["a b", "a b c", "x"]
    found = best_constant("summarisation", truths, (), "rougeL")
    # "a b": 1, 2*2/5, 0; "a b c": 2*2/5, 1, 0: the same; "x": 0, 0, 1. The first of the best is taken.
    assert found["answer"] == "a b"
    assert found["rougeL"] == pytest.approx((1 + 0.8) / 3)
