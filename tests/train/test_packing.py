"""Packed documents: every token of their labels, who sees whom, and the same loss as each alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loradock_testing.letters import BEGIN, END, Letters, ids
from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.dataset import Collator, build_dataset
from loradock_train.encode import IGNORED, Encoder, Example
from loradock_train.errors import ModelError
from loradock_train.loss import own_loss
from loradock_train.packing import can_pack, pack, split_long
from loradock_train.rows import Format, Row, Rows

VOCABULARY = 97
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64},
}  # fmt: skip
LAYERS = {"llama": "num_hidden_layers", "qwen3": "num_hidden_layers", "gpt2": "n_layer"}


def make(architecture: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields = {**ARCHITECTURES[architecture], LAYERS[architecture]: 2, "vocab_size": VOCABULARY, **special}
    made: Any = AutoModelForCausalLM
    return made.from_config(AutoConfig.for_model(architecture, **fields), attn_implementation=attention).eval()


def build(row_format: Format, values: list[dict[str, Any]], length: int, policy: Any = "error") -> Any:
    rows = Rows(row_format, tuple(Row("rows.jsonl", line, value) for line, value in enumerate(values, 1)), "0" * 64)
    return build_dataset(rows, Encoder(Letters()), length, policy, True, "train_path")


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_documents_in_one_row_token_by_token() -> None:
    dataset, report = build("text", [{"text": "ab"}, {"text": "cde"}], 12)
    assert dataset[0]["input_ids"].tolist() == [BEGIN, *ids("cde"), END, BEGIN, *ids("ab"), END]
    assert dataset[0]["labels"].tolist() == [IGNORED, *ids("cde"), END, IGNORED, *ids("ab"), END]
    assert dataset[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert (report.num_rows, report.num_documents, report.num_examples) == (2, 2, 1)
    assert (report.num_tokens, report.num_trained_tokens) == (9, 7)


def test_completions_in_one_row_token_by_token() -> None:
    """Prompts stay masked, and so does the first token of an answer that has no prompt before it."""
    dataset, _ = build("completion", [{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "f"}], 10)
    assert dataset[0]["input_ids"].tolist() == [BEGIN, *ids("abcd"), END, BEGIN, *ids("ef"), END]
    assert dataset[0]["labels"].tolist() == [IGNORED] * 3 + [*ids("cd"), END] + [IGNORED] * 2 + [*ids("f"), END]
    assert dataset[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_document_over_the_context_is_split_evenly_and_told() -> None:
    dataset, report = build("text", [{"text": "abcdefg"}, {"text": "h"}], 8)  # 9 and 3 tokens
    rows = sorted(dataset, key=lambda row: -len(row["input_ids"]))
    assert rows[0]["input_ids"].tolist() == [*ids("defg"), END, BEGIN, *ids("h"), END]
    assert rows[0]["labels"].tolist() == [IGNORED, *ids("efg"), END, IGNORED, *ids("h"), END]
    assert rows[1]["input_ids"].tolist() == [BEGIN, *ids("abc")]
    assert report.num_tokens == 12, "nothing is left out"
    assert report.notices("train_path", 8) == [
        "train_path: 1 of 2 documents over context_length 8 were split (nothing was left out)"
    ]


def test_long_rows_that_are_not_raw_text_keep_their_rule() -> None:
    _, report = build("completion", [{"prompt": "ab", "completion": "c" * 9}], 8, "truncate")
    assert (report.num_truncated, report.num_split, report.num_tokens) == (1, 0, 8)


@pytest.mark.parametrize("tokens", [1, 8, 9, 17, 64])
def test_pieces_are_whole_and_none_is_a_leftover(tokens: int) -> None:
    pieces = split_long(Example(list(range(tokens)), list(range(tokens))), 8)
    assert [token for piece in pieces for token in piece.input_ids] == list(range(tokens))
    lengths = [len(piece.input_ids) for piece in pieces]
    assert max(lengths) <= 8
    assert max(lengths) - min(lengths) <= 1


def test_every_document_is_packed_once_and_rows_are_nearly_full() -> None:
    lengths = [1 + (37 * index) % 50 for index in range(400)]
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(400))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.98


# ---- nobody sees another ---------------------------------------------------------------------------------------------

DOCUMENTS = [[5, 6, 7, 8, 9], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36], [40, 41]]


def packed_batch() -> dict[str, torch.Tensor]:
    """Two rows, padded: documents 0 and 1 and 3; document 2."""
    rows = []
    for members in ([0, 1, 3], [2]):
        documents = [DOCUMENTS[member] for member in members]
        rows.append(
            {
                "input_ids": [token for document in documents for token in document],
                "labels": [label for document in documents for label in [IGNORED, *document[1:]]],
                "position_ids": [position for document in documents for position in range(len(document))],
            }
        )
    batch = Collator(pad_token_id=0)(rows)
    assert int(batch.pop("num_tokens")) == sum(len(document) for document in DOCUMENTS)
    assert batch["input_ids"].shape == (2, 16)
    assert "attention_mask" not in batch
    return batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logits_and_loss_are_those_of_each_document_alone(architecture: str, attention: str) -> None:
    model = make(architecture, attention)
    batch = packed_batch()
    spans = [(0, 0, 5), (0, 5, 8), (1, 0, 7), (0, 8, 10)]  # row, start, end of each document
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        losses, count = 0.0, 0
        for document, (row, start, end) in zip(DOCUMENTS, spans, strict=True):
            tokens = torch.tensor([document])
            alone = model(input_ids=tokens, labels=tokens, use_cache=False)
            torch.testing.assert_close(packed[row, start:end], alone.logits[0], rtol=1e-5, atol=1e-5)
            losses += float(alone.loss) * (len(document) - 1)
            count += len(document) - 1
        with own_loss(model):
            ours = float(model(**batch).loss)
        theirs = float(model(**batch, use_cache=False).loss)
    assert ours == pytest.approx(losses / count, rel=1e-6)
    assert theirs == pytest.approx(losses / count, rel=1e-6)


def test_without_positions_documents_would_see_each_other() -> None:
    """What the two tests above would show if nothing kept documents apart."""
    model, batch = make("llama"), packed_batch()
    with torch.no_grad():
        apart = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        joined = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert float((apart - joined)[0, 5:8].abs().max()) > 1e-3


def test_one_document_in_every_row_needs_no_positions() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "position_ids": [0, 1, 2]}] * 2
    assert set(Collator(0)(rows)) == {"input_ids", "labels", "num_tokens"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_that_keeps_documents_apart_can_pack(architecture: str) -> None:
    assert can_pack(make(architecture), VOCABULARY)


def test_model_that_does_not_is_refused_before_it_trains(tmp_path: Path, write_rows: WriteRows) -> None:
    """Bloom knows no positions: its attention goes through the whole row."""
    options = {
        "model": {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2},
        "tokenizer": {"train_vocab_size": 300},
        "train_path": str(write_rows("text.jsonl", [{"text": f"def f{i}(): pass"} for i in range(9)])),
        "context_length": 32,
        "max_steps": 1,
    }
    with pytest.raises(ModelError, match=r"packing: BloomForCausalLM .* lets packed documents see each other"):
        train(options, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train({**options, "packing": False}, output=tmp_path / "run").summary["steps"] == 1


# ---- training --------------------------------------------------------------------------------------------------------


def test_packed_step_moves_the_weights_as_the_same_rows_do_alone(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    from safetensors.torch import load_file

    rows = [{"prompt": f"def f{i}():", "completion": f" return {i}" + " + x" * i} for i in range(6)]
    options = {
        "model_id": str(base), "train_path": str(write_rows("rows.jsonl", rows)), "context_length": 128,
        "learning_rate": 1e-2, "mixed_precision": "no", "max_steps": 1, "optim": "sgd",
    }  # fmt: skip
    packed = train({**options, "packing": True}, output=tmp_path / "packed")
    alone = train(options, output=tmp_path / "alone")
    assert packed.summary["data"]["train"]["num_examples"] < alone.summary["data"]["train"]["num_examples"] == 6
    assert packed.summary["tokens"] == alone.summary["tokens"]
    ours, theirs = (load_file(run.checkpoint / "model.safetensors") for run in (packed, alone))
    for name, tensor in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)
        assert name.endswith("norm.weight") or not torch.equal(ours[name], tensor)
