"""`loradock data`: what a look at the data finds, row by row."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loradock_testing.letters import BEGIN, END, Letters, ids
from loradock_testing.rows import WriteRows
from loradock_train.commands.data import data
from loradock_train.doctor import Examination, Span, examine, spans
from loradock_train.encode import IGNORED, Encoder, Example
from loradock_train.rows import Format, Row, Rows

app = typer.Typer()
app.command()(data)


def rows_of(row_format: Format, *values: dict[str, Any], name: str = "rows.jsonl") -> Rows:
    return Rows(row_format, tuple(Row(name, line, value) for line, value in enumerate(values, 1)), "0" * 64)


def found(examination: Examination) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {finding.message: (finding.num_rows, finding.first) for finding in examination.findings}


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_clean_rows_have_no_findings_and_are_counted() -> None:
    seen = examine(rows_of("completion", pair("a", "b"), pair("abc", "d")), Encoder(Letters()), 16, False)
    assert seen.findings == ()
    assert (seen.num_rows, seen.num_tokens, seen.num_trained_tokens) == (2, 4 + 6, 2 + 2)
    assert seen.percentiles == {"min": 4, "p50": 4, "p95": 6, "p99": 6, "max": 6}
    assert seen.histogram == ((4, 4, 1), (5, 5, 0), (6, 6, 1))


def test_long_row_and_answer_that_would_be_cut_away_are_named() -> None:
    seen = examine(
        rows_of("completion", pair("abcdefgh", "i"), pair("a", "bcdefghi"), pair("a", "b")),
        Encoder(Letters()),
        8,
        False,
    )
    assert found(seen) == {
        "over context_length 8": (2, ("rows.jsonl, line 1", "rows.jsonl, line 2")),
        "whose answer is cut away at context_length 8": (1, ("rows.jsonl, line 1",)),
    }


def test_raw_text_that_will_be_split_loses_nothing() -> None:
    seen = examine(rows_of("text", {"text": "abcdefghij"}), Encoder(Letters()), 8, True)
    assert found(seen) == {"over context_length 8": (1, ("rows.jsonl, line 1",))}


def test_copies_and_rows_of_both_splits_are_named() -> None:
    train = rows_of("completion", pair("a", "b"), pair("c", "d"), pair("a", "b"), pair("a", "b"))
    valid = rows_of("completion", pair("c", "d"), name="valid.jsonl")
    assert found(examine(train, Encoder(Letters()), 16, False, valid)) == {
        "there more than once (copies after the first)": (2, ("rows.jsonl, line 3", "rows.jsonl, line 4")),
        "in the other split as well": (1, ("rows.jsonl, line 2",)),
    }


def test_row_without_a_learnt_token_is_named() -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    assert found(examine(rows_of("chat", chat), Encoder(Letters()), 64, False)) == {
        "without a token that is learnt": (1, ("rows.jsonl, line 1",)),
        "that never learn to stop (no stop token is learnt)": (1, ("rows.jsonl, line 1",)),
    }


def test_rows_that_never_learn_to_stop_are_named() -> None:
    seen = examine(rows_of("completion", pair("a", "b")), Encoder(Letters(), append_eos=False), 16, False)
    assert found(seen) == {"that never learn to stop (no stop token is learnt)": (1, ("rows.jsonl, line 1",))}


def test_stop_token_within_an_answer_is_named() -> None:
    """The text of an answer may hold the very token that ends a turn."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    fine = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]
    seen = examine(rows_of("chat", {"messages": fine}, {"messages": turns}), Encoder(Letters()), 64, False)
    assert found(seen) == {
        "with a stop token within an answer (it would learn to stop there)": (1, ("rows.jsonl, line 2",))
    }


def test_context_length_is_suggested_by_the_p95() -> None:
    rows = [{"text": "a" * 98}] * 19 + [{"text": "a" * 498}]
    seen = examine(rows_of("text", *rows), Encoder(Letters()), 512, False)
    assert (seen.percentiles["p95"], seen.percentiles["max"]) == (100, 500)
    assert (seen.suggested_context_length, seen.share_held) == (128, 0.95)


def test_pairs_are_looked_at_answer_by_answer() -> None:
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "bcdefgh", "rejected": "d"}]
    seen = examine(rows_of("preference", *pairs), Encoder(Letters()), 8, False)
    assert (seen.num_rows, seen.num_tokens) == (2, 4 + 4 + 10 + 4)
    assert found(seen) == {"over context_length 8": (1, ("rows.jsonl, line 2 (preferred)",))}


def test_first_five_rows_of_a_finding_are_named_and_all_counted() -> None:
    seen = examine(rows_of("text", *[{"text": "ab"}] * 9), Encoder(Letters()), 16, True)
    assert [(finding.num_rows, len(finding.first)) for finding in seen.findings] == [(8, 5)]


def test_spans_follow_the_labels_and_the_first_token_is_never_learnt() -> None:
    assert spans(Example([BEGIN, *ids("ab"), END], [IGNORED, IGNORED, *ids("b"), END])) == [
        Span((BEGIN, *ids("a")), False),
        Span((*ids("b"), END), True),
    ]
    assert spans(Example(ids("ab"), ids("ab"))) == [Span(tuple(ids("a")), False), Span(tuple(ids("b")), True)]


@pytest.fixture
def config(base: Path, tmp_path: Path, write_rows: WriteRows) -> Path:
    write_rows("rows.jsonl", [pair("def f():", " return 1"), pair("def f():", " return 1")])
    write_rows("valid.jsonl", [pair("def g():", " pass")])
    path = tmp_path / "run.yaml"
    path.write_text(f"model_id: {base}\ntrain_path: rows.jsonl\nvalid_path: valid.jsonl\ncontext_length: 64\n")
    return path


def test_command_shows_what_is_learnt_in_brackets(config: Path) -> None:
    result = CliRunner().invoke(app, [str(config), "--rows", "1"])
    assert result.exit_code == 0, result.output
    assert "train: 2 completion rows, " in result.stdout
    assert "1 rows there more than once (copies after the first): " in result.stdout
    assert "def f():⟦ return 1</s>⟧" in result.stdout
    assert "context_length 64 would hold 100.0% of them whole" in result.stdout
    assert "valid: 1 completion rows, " in result.stdout


def test_command_json_is_one_document(config: Path) -> None:
    document = json.loads(CliRunner().invoke(app, [str(config), "--json"]).stdout)
    assert (document["train"]["num_rows"], document["valid"]["num_rows"]) == (2, 1)
    assert document["train"]["findings"][0]["num_rows"] == 1


def test_command_says_where_padding_is_the_end_of_text(config: Path, tmp_path: Path, base: Path) -> None:
    import shutil

    shutil.copytree(base, tmp_path / "same")
    settings = tmp_path / "same" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": "</s>"}))
    result = CliRunner().invoke(app, [str(config), "--set", f"model_id={tmp_path / 'same'}"])
    assert "pad and end of text are one token" in result.stderr
    assert "pad and end of text" not in CliRunner().invoke(app, [str(config)]).stderr


def test_command_shows_both_answers_of_a_pair(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows("pairs.jsonl", [{"prompt": "def f():", "chosen": " return 1", "rejected": " pass"}])
    path = tmp_path / "run.yaml"
    path.write_text(f"model_id: {base}\ntrain_path: pairs.jsonl\ncontext_length: 64\npreference: {{}}\n")
    shown = CliRunner().invoke(app, [str(path)]).stdout
    assert "line 1 (preferred): ⟦learnt⟧\ndef f():⟦ return 1</s>⟧" in shown
    assert "line 1 (other): ⟦learnt⟧" in shown
    assert "def f():⟦ pass</s>⟧" in shown


def test_preview_on_a_terminal_is_green_where_it_is_learnt(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = CliRunner().invoke(app, [str(config), "--rows", "1"], color=True).stdout
    assert "\x1b[32m⟦ return 1</s>⟧" in shown
