"""Preference data: rows checked line by line, tokens of both answers, and runs in which the preferred one wins."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loradock_testing.letters import BEGIN, END, TURN_END, Letters, ids
from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.dataset import Collator
from loradock_train.encode import IGNORED, Encoder
from loradock_train.errors import ConfigError, DataError, ModelError
from loradock_train.preference import PairCollator, build_pairs
from loradock_train.rows import Row, Rows, read_rows

_ = IGNORED
PAIRS = [{"prompt": f"def f{i}():", "chosen": f" return {i}", "rejected": f" pass # {i}"} for i in range(8)]
ASKED = {"messages": [{"role": "user", "content": "q"}]}


def says(content: Any, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


OPENAI: dict[str, Any] = {"input": ASKED, "preferred_output": says("yes"), "non_preferred_output": says("no")}


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [PAIRS[0], OPENAI, {"prompt": ASKED["messages"], "chosen": says("yes"), "rejected": says("no")}]
)
def test_both_shapes_are_told_by_their_keys(write_rows: WriteRows, row: dict[str, Any]) -> None:
    assert read_rows([str(write_rows("rows.jsonl", [row]))], "auto", "train_path").format == "preference"


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in OPENAI.items() if name != key}


TOOL = {"type": "function", "function": {"name": "add"}}
SUB = {"id": "c", "type": "function", "function": {"name": "sub", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing key 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty: there is nothing to learn"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": says("b"), "rejected": "c"}, "must be three strings or three lists of messages"),
        (
            {"prompt": ASKED["messages"], "chosen": says("b"), "rejected": []},
            "'rejected' must be a list of one assistant",
        ),
        (without("input"), "missing key 'input'"),
        (without("non_preferred_output"), "missing key 'non_preferred_output'"),
        ({**OPENAI, "input": {"messages": []}}, "'input.messages' must be a non-empty list"),
        ({**OPENAI, "input": {"messages": says("a")}}, "'input.messages' must not end with an assistant message"),
        ({**OPENAI, "preferred_output": says("a") * 2}, "'preferred_output' must be a list of one assistant message"),
        (
            {**OPENAI, "preferred_output": says("a", "user")},
            "preferred_output[0]: role must be 'assistant', found 'user'",
        ),
        ({**OPENAI, "preferred_output": says(3)}, "preferred_output[0]: missing or non-string 'content'"),
        ({**OPENAI, "preferred_output": says("no")}, "preferred_output and non_preferred_output are the same"),
        (
            {
                **OPENAI,
                "input": {**ASKED, "tools": [TOOL]},
                "preferred_output": [{"role": "assistant", "content": None, "tool_calls": [SUB]}],
            },
            "'preferred_output[0].tool_calls[0].function.name' is 'sub', which is not among the row's tools (add)",
        ),
    ],
)
def test_wrong_pair_names_its_line_and_place(write_rows: WriteRows, row: dict[str, Any], expected: str) -> None:
    path = write_rows("rows.jsonl", [PAIRS[0] if "prompt" in row else OPENAI, row])
    with pytest.raises(DataError) as caught:
        read_rows([str(path)], "auto", "train_path")
    assert caught.value.exit_code == 2
    assert "rows.jsonl, line 2: " in str(caught.value)
    assert expected in str(caught.value)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_both_answers_stand_after_the_prompt_token_by_token() -> None:
    chosen, rejected = Encoder(Letters()).pair(Row("r", 1, {"prompt": "ab", "chosen": "c", "rejected": "de"}))
    assert (chosen.input_ids, chosen.labels) == ([BEGIN, *ids("abc"), END], [_, _, _, *ids("c"), END])
    assert (rejected.input_ids, rejected.labels) == ([BEGIN, *ids("abde"), END], [_, _, _, *ids("de"), END])


def test_only_the_last_answer_of_a_chat_is_compared() -> None:
    context = [*ASKED["messages"], *says("x"), {"role": "user", "content": "r"}]
    chosen, rejected = Encoder(Letters()).pair(Row("r", 1, {**OPENAI, "input": {"messages": context}}))
    assert [label for label in chosen.labels if label != IGNORED] == [*ids("yes"), TURN_END]
    assert [label for label in rejected.labels if label != IGNORED] == [*ids("no"), TURN_END]


def test_batch_has_the_preferred_answers_first() -> None:
    rows = Rows("preference", (Row("r", 1, {"prompt": "a", "chosen": "bc", "rejected": "d"}),), "0" * 64)
    dataset, report = build_pairs(rows, Encoder(Letters()), 16, "error", "train_path")
    batch = PairCollator(Collator(0))([dataset[0]])
    assert batch["input_ids"].tolist() == [[BEGIN, *ids("abc"), END], [BEGIN, *ids("ad"), END, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert int(batch["num_tokens"]) == 9
    assert (report.num_tokens, report.num_trained_tokens, report.longest_tokens) == (9, 5, 5)


@pytest.mark.parametrize(
    ("policy", "length", "expected"),
    [
        ("error", 8, "9 tokens are over context_length 8"),
        ("truncate", 4, "both answers are the same at context_length"),
    ],
)
def test_long_pair_is_named(policy: str, length: int, expected: str) -> None:
    row = Row("r.jsonl", 5, {"prompt": "a", "chosen": "bcdefg", "rejected": "bcx"})
    with pytest.raises(DataError, match=r"r\.jsonl, line 5: ") as caught:
        build_pairs(Rows("preference", (row,), "0" * 64), Encoder(Letters()), length, policy, "train_path")
    assert expected in str(caught.value)


# ---- runs ------------------------------------------------------------------------------------------------------------


def options(base: Path, data: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_id": str(base), "train_path": str(data), "valid_path": str(data), "context_length": 64,
        "mixed_precision": "no", "learning_rate": 5e-3, "max_steps": 8, "train_batch_size_per_device": 4,
        "logging_steps": 2, "preference": {"beta": 0.2}, **more,
    }  # fmt: skip


def margin(model: Any, tokenizer: Any) -> float:
    """Mean over the pairs of log p(chosen) - log p(rejected), each with its end, computed by hand."""
    total = 0.0
    for row in PAIRS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for sign, name in ((1, "chosen"), (-1, "rejected")):
            answer = tokenizer(row[name], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            total += sign * sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
    return total / len(PAIRS)


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["lora", "full"])
def test_preferred_answers_become_likelier_than_the_others(
    base: Path, tmp_path: Path, write_rows: WriteRows, lora: dict[str, Any] | None
) -> None:
    more = {} if lora is None else {"lora_config": lora}
    run = train(options(base, write_rows("rows.jsonl", PAIRS), **more), output=tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = margin(plain, tokenizer)
    checkpoint = (
        AutoModelForCausalLM.from_pretrained(run.checkpoint)
        if lora is None
        else PeftModel.from_pretrained(plain, run.checkpoint)
    )
    after = margin(checkpoint, tokenizer)
    told = lines[-1]["eval_rewards/margins"]
    assert told == pytest.approx(0.2 * (after - before), rel=2e-2, abs=1e-3), "the base alone is the reference"
    assert told > 0.1
    trained = [line for line in lines if "rewards/margins" in line]
    assert trained[-1]["rewards/margins"] > trained[0]["rewards/margins"]
    assert run.summary["data"]["train"]["format"] == "preference"
    assert run.summary["proof"]["reloaded"] < 1e-3
    assert (run.checkpoint / "loradock.json").is_file()


def test_first_step_has_the_loss_of_no_preference(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    """Adapter and reference agree before the first update: log 2."""
    run = train(
        options(base, write_rows("rows.jsonl", PAIRS), lora_config={"r": 4}, max_steps=1), output=tmp_path / "run"
    )
    assert run.final_train_loss == pytest.approx(0.693147, abs=1e-5)


def test_accumulated_pairs_move_the_weights_as_one_batch_does(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    common = {"max_steps": 1, "optim": "sgd", "group_by_length": False, "learning_rate": 1e-1}
    data = write_rows("rows.jsonl", PAIRS[:4])
    whole = train(options(base, data, **common, train_batch_size_per_device=4), output=tmp_path / "whole")
    apart = options(base, data, **common, train_batch_size_per_device=1, gradient_accumulation_steps=4)
    ours, theirs = (
        load_file(run.checkpoint / "model.safetensors") for run in (whole, train(apart, output=tmp_path / "parts"))
    )
    moved = 0.0
    for name, tensor in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)
        moved = max(moved, float((ours[name] - tensor).abs().max()))
    assert moved > 1e-4


def test_adapter_holds_no_reference(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    run = train(
        options(base, write_rows("rows.jsonl", PAIRS), lora_config={"r": 4}, max_steps=2), output=tmp_path / "run"
    )
    names = load_file(run.checkpoint / "adapter_model.safetensors")
    assert names
    assert not any("ref" in name.split(".") for name in names)
    assert {path.name for path in run.checkpoint.iterdir()} >= {"adapter_config.json", "loradock.json"}


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_pairs_without_a_preference_section_say_so(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    config = options(base, write_rows("rows.jsonl", PAIRS))
    del config["preference"]
    with pytest.raises(DataError, match=r"add a section preference: \{\}"):
        train(config, output=tmp_path / "run")


def test_preference_on_other_rows_says_what_they_are(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    data = write_rows("rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="these are completion rows"):
        train(options(base, data), output=tmp_path / "run")


def test_without_trl_the_error_names_the_extra(
    base: Path, tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loradock_train.preference.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'loradock\[preference\]'") as caught:
        train(options(base, write_rows("rows.jsonl", PAIRS)), output=tmp_path / "run")
    assert caught.value.exit_code == 2


def test_adapter_on_the_head_is_refused(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    lora = {"r": 4, "target_modules": ["lm_head"]}
    with pytest.raises(ModelError, match="does not train an adapter on lm_head"):
        train(options(base, write_rows("rows.jsonl", PAIRS), lora_config=lora), output=tmp_path / "run")


def test_packing_beside_preference_is_refused(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    with pytest.raises(ConfigError, match="preference and packing do not go together"):
        train(options(base, write_rows("rows.jsonl", PAIRS), packing=True), output=tmp_path / "run")
