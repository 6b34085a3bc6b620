"""Passports against bases: what is refused, what is remarked on, and what `force` lets through."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base import BaseModel, base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.findings import Findings
from loradock_adapters.gate_passport import judge_passport
from loradock_adapters.passport import Passport, PassportBase, weights_sha256, write_passport
from loradock_adapters.probe import Probe, ProbePrompt, ProbeToken
from loradock_adapters.vocabulary import Vocabulary, read_vocabulary
from loradock_testing.checkpoints import write_adapter, write_full

VOCAB = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}


def write_tokenizer(directory: Path, vocab: dict[str, int] | None = None, **more: Any) -> Vocabulary:
    vocab = VOCAB if vocab is None else vocab
    added = [{"id": vocab[text], "content": text, "special": True} for text in ("<s>", "</s>") if text in vocab]
    document = {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab}} | more
    (directory / "tokenizer.json").write_text(json.dumps(document))
    vocabulary = read_vocabulary(directory)
    assert vocabulary is not None
    return vocabulary


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    directory = write_full(tmp_path / "base")
    write_tokenizer(directory)
    return base_from(directory, weights_sha256=weights_sha256(directory))


def passport_of(served: BaseModel, **changes: Any) -> Passport:
    """What the trainer writes for this base, with changes."""
    assert served.directory is not None
    vocabulary = read_vocabulary(served.directory)
    assert vocabulary is not None
    fields: dict[str, Any] = {
        "base": PassportBase(model_id="org/base", weights_sha256=served.weights_sha256),
        "tokenizer_sha256": vocabulary.file_sha256,
        "vocabulary_sha256": vocabulary.sha256,
        "special_tokens": dict(vocabulary.special_tokens),
    }
    return Passport(**fields | changes)


def findings_of(tmp_path: Path, base: BaseModel | None, passport: Passport, *, force: bool = False) -> Findings:
    directory = write_adapter(tmp_path / "adapter")
    write_passport(directory, passport)
    findings = Findings()
    judge_passport(read_checkpoint(directory), base, findings, force=force)
    return findings


def codes(problems: list[Any]) -> list[str]:
    return [problem.code for problem in problems]


def test_passport_of_this_very_base_is_worth_no_word(tmp_path: Path, base: BaseModel) -> None:
    assert findings_of(tmp_path, base, passport_of(base)).reasons == ()


def test_other_base_weights_are_explained_and_refused_unless_forced(tmp_path: Path, base: BaseModel) -> None:
    passport = passport_of(base, base=PassportBase(model_id="org/other", weights_sha256="ab" * 32))
    (problem,) = findings_of(tmp_path, base, passport).refusals
    assert problem.code == "base_weights_differ"
    assert "trained on org/other with weights abababababab, the served base has" in problem.message
    assert "a difference from the weights that it was trained on" in problem.message
    assert "push with --force" in problem.fix
    forced = findings_of(tmp_path / "again", base, passport, force=True)
    assert (forced.refusals, codes(forced.remarks)) == ([], ["base_weights_differ"])


def test_tokenizer_that_differs_only_in_form_is_remarked_on(tmp_path: Path, base: BaseModel) -> None:
    found = findings_of(tmp_path, base, passport_of(base, tokenizer_sha256="cd" * 32))
    assert (found.refusals, codes(found.remarks)) == ([], ["tokenizer_differs"])
    assert "every token has the same id in both" in found.remarks[0].message


def test_vocabulary_with_other_ids_is_refused_unless_forced(tmp_path: Path, base: BaseModel) -> None:
    passport = passport_of(base, tokenizer_sha256="cd" * 32, vocabulary_sha256="ef" * 32)
    (problem,) = findings_of(tmp_path, base, passport).refusals
    assert problem.code == "vocabulary_differs"
    assert "the same text becomes other ids" in problem.message
    assert codes(findings_of(tmp_path / "again", base, passport, force=True).remarks) == ["vocabulary_differs"]


def test_special_token_that_moved_or_is_none_is_named_with_both_ids(tmp_path: Path, base: BaseModel) -> None:
    passport = passport_of(base, special_tokens={"<s>": 0, "</s>": 7, "<|im_end|>": 9})
    found = findings_of(tmp_path, base, passport).refusals
    assert codes(found) == ["special_tokens_differ"] * 2
    assert found[0].where == "</s>: 7 at the training, 1 here"
    assert found[1].where == "<|im_end|>: 9 at the training, no special token here"


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, base: BaseModel) -> None:
    prompt = ProbePrompt(prompt_token_ids=(1, 99), top=(ProbeToken(id=2, logprob=-0.1),))
    passport = passport_of(base, stop_token_ids=(1, 40), probe=Probe(dtype="float32", prompts=(prompt,)))
    found = findings_of(tmp_path, base, passport).refusals
    assert [problem.where for problem in found] == ["loradock.json: stop_token_ids: 40", "loradock.json: probe: 99"]


def test_template_that_was_changed_after_the_training_is_remarked_on(tmp_path: Path, base: BaseModel) -> None:
    trained = hashlib.sha256(b"{{ trained }}").hexdigest()
    same = passport_of(base, chat_template="{{ trained }}", chat_template_sha256=trained)
    assert findings_of(tmp_path, base, same).reasons == ()
    changed = passport_of(base, chat_template="{{ edited }}", chat_template_sha256=trained)
    assert codes(findings_of(tmp_path / "again", base, changed).remarks) == ["chat_template_differs"]


def test_base_that_is_not_known_or_not_local_is_not_compared(tmp_path: Path, base: BaseModel) -> None:
    passport = passport_of(base)
    assert findings_of(tmp_path, None, passport).reasons == ()
    derived = base_from(base.config, model_id="org/base")
    assert findings_of(tmp_path / "again", derived, passport).reasons == ()


def test_full_model_is_held_to_its_own_tokenizer(tmp_path: Path, base: BaseModel) -> None:
    directory = write_full(tmp_path / "full")
    vocabulary = write_tokenizer(directory, VOCAB | {"c": 4})
    write_passport(directory, passport_of(base, vocabulary_sha256=vocabulary.sha256))
    findings = Findings()
    judge_passport(read_checkpoint(directory), base, findings)
    assert (findings.refusals, codes(findings.remarks)) == ([], ["tokenizer_differs"])
    write_tokenizer(directory, VOCAB | {"d": 4})
    judge_passport(read_checkpoint(directory), base, findings)
    assert codes(findings.refusals) == ["vocabulary_differs"]


def test_vocabulary_is_the_same_whatever_the_form_of_the_file(tmp_path: Path) -> None:
    first = write_tokenizer(tmp_path)
    second = write_tokenizer(tmp_path, dict(reversed(VOCAB.items())), truncation=None)
    assert (first.sha256, first.special_tokens, first.size) == (second.sha256, second.special_tokens, 4)
    assert first.file_sha256 != second.file_sha256
    unigram = write_tokenizer(tmp_path, model={"vocab": [["<s>", 0.0], ["</s>", 0.0], ["a", -1.0], ["b", -2.0]]})
    assert unigram.sha256 == first.sha256


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 1}', '{"model": {"vocab": {"a": "x"}}}', "[" * 100_000])
def test_tokenizer_file_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    assert read_vocabulary(tmp_path) is None
    assert read_vocabulary(tmp_path / "absent") is None
