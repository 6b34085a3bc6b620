"""Scores of answers: accuracy and F1 of classes, ROUGE of summaries, exact match and token F1 of free answers.

Pure functions of texts, all between 0 and 1, more is better. Knows nothing of models or rows.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

CLASS_METRICS = ("accuracy", "macro_f1")
SUMMARY_METRICS = ("rougeL", "rouge1", "rouge2")
ANSWER_METRICS = ("exact_match", "token_f1")


# ---- classes ---------------------------------------------------------------------------------------------------------


def confusion_matrix(truths: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Rows are what is true, columns what was answered, both in the order of `labels`."""
    index = {label: place for place, label in enumerate(labels)}
    matrix = [[0] * len(labels) for _ in labels]
    for truth, answer in zip(truths, answers, strict=True):
        matrix[index[truth]][index[answer]] += 1
    return matrix


def class_scores(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support (rows that are true of it) of each class; a share of nothing is 0."""
    scores: dict[str, dict[str, float]] = {}
    for place, label in enumerate(labels):
        right, answered = matrix[place][place], sum(row[place] for row in matrix)
        support = sum(matrix[place])
        precision, recall = right / max(1, answered), right / max(1, support)
        f1 = 2 * right / max(1, answered + support)
        scores[label] = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    return scores


def classification(truths: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, and the mean F1 of the classes that occur, in the truth or in an answer: of others nothing is known."""
    matrix = confusion_matrix(truths, answers, labels)
    scores = class_scores(matrix, labels)
    seen = [scores[label]["f1"] for label in labels if label in {*truths, *answers}]
    right = sum(matrix[place][place] for place in range(len(labels)))
    return {"accuracy": right / len(truths), "macro_f1": sum(seen) / len(seen)}


# ---- summaries -------------------------------------------------------------------------------------------------------


def rouge_tokens(text: str) -> list[str]:
    """Lower-case runs of letters a-z and digits, without stemming: as the usual rouge_score package splits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def f1_of(common: int, answered: int, true: int) -> float:
    """Harmonic mean of common/answered and common/true; 0 where either is empty."""
    return 2 * common / (answered + true) if answered and true else 0.0


def rouge_n(truth: str, answer: str, n: int) -> float:
    """ROUGE-N: F1 of the n-grams, each counted as often as it stands in both (Lin, "ROUGE: A Package for Automatic
    Evaluation of Summaries", 2004, section 2)."""
    grams = [
        Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))
        for tokens in (rouge_tokens(truth), rouge_tokens(answer))
    ]
    return f1_of((grams[0] & grams[1]).total(), grams[1].total(), grams[0].total())


def rouge_l(truth: str, answer: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of tokens (section 3 of the same paper), over the whole text."""
    true, answered = rouge_tokens(truth), rouge_tokens(answer)
    return f1_of(longest_common(true, answered), len(answered), len(true))


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence. Each row of the usual table is one integer, a bit for a token of
    `one` (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004)."""
    masks: dict[str, int] = {}
    for place, token in enumerate(one):
        masks[token] = masks.get(token, 0) | (1 << place)
    full = (1 << len(one)) - 1
    row = full
    for token in other:
        met = row & masks.get(token, 0)
        row = ((row + met) | (row - met)) & full
    return len(one) - row.bit_count()


# ---- free answers ----------------------------------------------------------------------------------------------------


def exact_match(truth: str, answer: str) -> float:
    """1 where the two are the same but for white space at their ends."""
    return float(truth.strip() == answer.strip())


def token_f1(truth: str, answer: str) -> float:
    """F1 of the words, without order (Rajpurkar and others, "SQuAD", 2016): lower case, runs of letters and digits of
    any script. Two empty answers agree."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in (truth, answer)]
    if not words[0] and not words[1]:
        return 1.0
    return f1_of((words[0] & words[1]).total(), words[1].total(), words[0].total())


def scores_of(kind: str, truth: str, answer: str) -> dict[str, float]:
    """The scores of one written answer, for the kind of task."""
    if kind == "summarisation":
        return {
            "rouge1": rouge_n(truth, answer, 1),
            "rouge2": rouge_n(truth, answer, 2),
            "rougeL": rouge_l(truth, answer),
        }
    return {"exact_match": exact_match(truth, answer), "token_f1": token_f1(truth, answer)}


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def best_constant(kind: str, truths: Sequence[str], labels: Sequence[str], metric: str) -> dict[str, Any]:
    """What the best answer that is always the same would score: what a model must beat to have learnt anything.

    Of classes, each is tried; of written answers, the 20 commonest truths.
    """
    if labels:
        tried = [(label, classification(truths, [label] * len(truths), labels)) for label in labels]
    else:
        common = [answer for answer, _ in Counter(truths).most_common(20)]
        tried = [(answer, mean_scores([scores_of(kind, truth, answer) for truth in truths])) for answer in common]
    answer, scores = max(tried, key=lambda entry: entry[1][metric])
    return {"answer": answer, **scores}
