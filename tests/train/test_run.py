"""Whole runs on a tiny base: what is written, that it is what was trained, and that a bad run leaves nothing behind."""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loradock_adapters.passport import read_passport, weights_sha256
from loradock_adapters.vocabulary import read_vocabulary
from loradock_testing.rows import WriteRows
from loradock_testing.tiny_models import ALL_MODULES, make_llama
from loradock_train import train
from loradock_train.errors import ConfigError, DataError, ModelError, OutputError, ProofError

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(4)
]


def options(base: Path, data: Path, **values: Any) -> dict[str, Any]:
    return {
        "model_id": str(base),
        "train_path": str(data),
        "context_length": 128,
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "max_steps": 3,
        **values,
    }


def logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].float()
    return found


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_list_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter on the seed template's whole list, embedding and head among them."""
    folder = tmp_path_factory.mktemp("whole")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": list(ALL_MODULES)}
    return train(
        options(base, data, lora_config=lora, valid_path=str(data), license="apache-2.0"), output=folder / "run"
    )


def test_lora_run_writes_the_adapter_and_nothing_else(whole_list_run: Any) -> None:
    assert {path.name for path in whole_list_run.checkpoint.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "loradock.json", "README.md",
    }  # fmt: skip
    assert {path.name for path in whole_list_run.directory.iterdir()} == {
        "checkpoint", "config.yaml", "loss.png", "metrics.jsonl", "run.json",
    }  # fmt: skip


def test_adapter_on_embedding_and_head_holds_no_base_matrix(whole_list_run: Any) -> None:
    tensors = load_file(whole_list_run.checkpoint / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    assert any("embed_tokens.lora_embedding_A" in name for name in tensors)
    assert any("lm_head.lora_A" in name for name in tensors)
    assert max(tensor.numel() for tensor in tensors.values()) <= 4 * 512, "rank times vocabulary, no more"


def test_adapter_config_is_pefts_own(whole_list_run: Any) -> None:
    config = json.loads((whole_list_run.checkpoint / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert config["target_modules"] == sorted(ALL_MODULES)
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")


def test_adapter_loaded_by_peft_answers_as_the_trainer_did(whole_list_run: Any, base: Path) -> None:
    passport = read_passport(whole_list_run.checkpoint)
    assert passport is not None
    assert passport.probe is not None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole_list_run.checkpoint)
    for probe in passport.probe.prompts:
        found = logits(model, list(probe.prompt_token_ids))
        for best in probe.top:
            assert float(found[best.id]) == pytest.approx(best.logit, abs=1e-3)
            assert float(found.log_softmax(-1)[best.id]) == pytest.approx(best.logprob, abs=1e-3)


def test_adapter_changes_the_answers_of_its_base(whole_list_run: Any, base: Path) -> None:
    passport = read_passport(whole_list_run.checkpoint)
    assert passport is not None
    assert passport.probe is not None
    prompt = list(passport.probe.prompts[0].prompt_token_ids)
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain, prompt)
    for best in passport.probe.prompts[0].base_top:
        assert float(before.log_softmax(-1)[best.id]) == pytest.approx(best.logprob, abs=1e-3)
    after = logits(PeftModel.from_pretrained(plain, whole_list_run.checkpoint), prompt)
    assert float((after - before).abs().max()) > 0.1
    assert passport.probe.max_logit_difference["base"] > 0.1
    assert passport.probe.max_logit_difference["reloaded"] < 1e-3


def test_passport_ties_the_adapter_to_its_base(whole_list_run: Any, base: Path) -> None:
    passport = read_passport(whole_list_run.checkpoint)
    assert passport is not None
    assert passport.base.model_id == str(base)
    assert passport.base.weights_sha256 == weights_sha256(base)
    assert passport.context_length == 128
    assert passport.seed == 42
    assert passport.stop_token_ids == (2,)
    vocabulary = read_vocabulary(base)
    assert vocabulary is not None
    assert passport.tokenizer_sha256 == vocabulary.file_sha256
    assert passport.vocabulary_sha256 == vocabulary.sha256
    assert passport.special_tokens == dict(vocabulary.special_tokens)
    assert {"<s>", "</s>", "<|user|>"} <= passport.special_tokens.keys()
    assert passport.chat_template is not None
    assert passport.chat_template_sha256 == hashlib.sha256(passport.chat_template.encode()).hexdigest()
    assert passport.data_sha256 is not None
    assert passport.license == "apache-2.0"
    assert passport.probe is not None
    assert (passport.probe.dtype, passport.probe.computed_in) == ("float32", "float32")
    assert passport.versions["peft"] == "0.21.2"
    assert passport.metrics["final_eval_loss"] == whole_list_run.final_eval_loss


def test_run_json_says_what_was_done(whole_list_run: Any) -> None:
    summary = json.loads((whole_list_run.directory / "run.json").read_text())
    assert summary == whole_list_run.summary
    assert (summary["kind"], summary["steps"], summary["used_own_loss"]) == ("lora", 3, True)
    assert summary["checkpoint_bytes"] == sum(path.stat().st_size for path in whole_list_run.checkpoint.iterdir())
    assert summary["data"]["train"]["num_rows"] == 8


def test_loss_plot_is_a_picture(whole_list_run: Any) -> None:
    assert (whole_list_run.directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_model_card_has_the_numbers_and_the_command(whole_list_run: Any) -> None:
    card = (whole_list_run.checkpoint / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "| rank, alpha | 4, 8 |" in card
    assert "| training rows | 8 (completion), " in card
    assert "loradock push . run" in card


def test_resolved_config_trains_the_same_again(whole_list_run: Any, tmp_path: Path) -> None:
    again = train(whole_list_run.directory / "config.yaml", output=tmp_path / "again")
    first, second = (load_file(run.checkpoint / "adapter_model.safetensors") for run in (whole_list_run, again))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("arithmetic", ["no", "bf16"])
def test_adapter_over_a_bf16_base_is_saved_in_bf16(tmp_path: Path, write_rows: WriteRows, arithmetic: str) -> None:
    half = make_llama(tmp_path / "half", dtype=torch.bfloat16)
    lora = {"r": 2, "target_modules": list(ALL_MODULES)}
    run = train(
        options(half, write_rows("r.jsonl", ROWS), lora_config=lora, mixed_precision=arithmetic),
        output=tmp_path / "run",
    )
    assert run.summary["precision"] == {"weights": "bfloat16", "arithmetic": arithmetic, "saved": "bfloat16"}
    tensors = load_file(run.checkpoint / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_save_dtype_is_obeyed(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    lora = options(base, write_rows("r.jsonl", ROWS), lora_config={"r": 2}, save_dtype="bfloat16")
    tensors = load_file(train(lora, output=tmp_path / "run").checkpoint / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_adapter_that_needs_a_dedicated_engine_says_so(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    run = train(options(base, write_rows("r.jsonl", ROWS), lora_config=lora), output=tmp_path / "run")
    assert any("modules_to_save" in notice and "dedicated engine" in notice for notice in run.summary["notices"])


# ---- full and from scratch -----------------------------------------------------------------------------------------


def test_full_run_is_loadable_by_transformers_as_it_is(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    run = train(options(base, write_rows("r.jsonl", CHATS), save_dtype="bfloat16"), output=tmp_path / "run")
    model: Any = AutoModelForCausalLM.from_pretrained(run.checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(run.checkpoint)
    config = json.loads((run.checkpoint / "config.json").read_text())
    assert run.kind == "full"
    assert (model.dtype, config["dtype"]) == (torch.bfloat16, "bfloat16")
    assert "torch_dtype" not in config
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    passport = read_passport(run.checkpoint)
    assert passport is not None
    assert passport.base.weights_sha256 == weights_sha256(base)


def test_selective_run_changes_what_its_patterns_name_and_saves_everything(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    console = Console(file=io.StringIO(), width=200)
    chosen = options(base, write_rows("rows.jsonl", ROWS), trainable=[r"layers\.1\..*proj"])
    run = train(chosen, output=tmp_path / "run", console=console)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run.checkpoint))
    assert after.keys() == before.keys(), "the checkpoint is whole"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers.1." in name and "proj" in name}
    told = run.summary["parameters"]
    assert told["trainable"] == sum(before[name].numel() for name in changed)
    assert told["total"] == sum(tensor.numel() for tensor in before.values())
    assert {row["name"] for row in told["modules"] if row["trainable"]} == {
        *(f"model.layers.*.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert isinstance(console.file, io.StringIO)
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj +8,192 +16,384 +50\.000%", console.file.getvalue())


def test_full_run_of_a_tied_model_stays_tied(tmp_path: Path, write_rows: WriteRows) -> None:
    tied = make_llama(tmp_path / "tied", tied=True)
    run = train(options(tied, write_rows("r.jsonl", ROWS)), output=tmp_path / "run")
    assert "lm_head.weight" not in load_file(run.checkpoint / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(run.checkpoint)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    "architecture",
    [
        {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    ],
)
def test_model_from_scratch_becomes_a_base_for_adapters(
    tmp_path: Path, write_rows: WriteRows, architecture: dict[str, Any]
) -> None:
    texts = write_rows(
        "text.jsonl", [{"text": f"def function_{i}(value):\n    return value + {i}\n"} for i in range(40)]
    )
    scratch = {
        "model": architecture,
        "tokenizer": {"train_vocab_size": 300},
        "train_path": str(texts),
        "context_length": 32,
        "max_steps": 4,
        "learning_rate": 1e-2,
    }
    made = train(scratch, output=tmp_path / "base")
    assert (made.kind, made.summary["data"]["train"]["format"]) == ("scratch", "text")
    tokenizer: Any = AutoTokenizer.from_pretrained(made.checkpoint)
    assert tokenizer("def f")["input_ids"] == tokenizer.encode("def f", add_special_tokens=False)
    assert tokenizer.decode(tokenizer("é\n\tx = {'ü'}")["input_ids"]) == "é\n\tx = {'ü'}"
    adapter = train(
        options(tmp_path / "base", write_rows("c.jsonl", CHATS), lora_config={"r": 2}, context_length=64),
        output=tmp_path / "lora",
    )
    passport = read_passport(adapter.checkpoint)
    assert passport is not None
    assert passport.base.weights_sha256 == weights_sha256(made.checkpoint)
    assert passport.stop_token_ids == tuple(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))


def test_run_without_chat_template_takes_chatml_where_the_tokenizer_knows_its_tokens(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="has no chat template; set chat_template:"):
        train(options(bare, write_rows("c.jsonl", CHATS), lora_config={}), output=tmp_path / "run")


def test_chat_template_of_the_config_is_trained_with_and_saved(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    run = train(
        options(base, write_rows("c.jsonl", CHATS), lora_config={"r": 2}, chat_template=template),
        output=tmp_path / "run",
    )
    passport = read_passport(run.checkpoint)
    assert passport is not None
    assert passport.chat_template == template
    assert (run.checkpoint / "chat_template.jinja").read_text() == template


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_training_that_changes_nothing_fails_and_leaves_no_checkpoint(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    nothing = options(base, write_rows("r.jsonl", ROWS), lora_config={"r": 2}, learning_rate=1e-30)
    with pytest.raises(ProofError, match=r"training changed nothing: on 4 prompts the lora checkpoint answers exactly"):
        train(nothing, output=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "ends",
    [
        {"max_steps": 4},
        {"max_steps": None, "num_epochs": 2, "valid_path": "rows.jsonl", "train_batch_size_per_device": 4},
        {"max_steps": 100, "streaming": True, "num_epochs": 2, "train_batch_size_per_device": 4, "shuffle_buffer": 4},
        {
            "max_steps": 100, "valid_path": "rows.jsonl", "eval_steps": 1,
            "early_stopping": {"patience": 3, "min_delta": 1e3},
        },
    ],
    ids=["steps", "epochs", "stream", "early"],
)  # fmt: skip
def test_final_loss_is_that_of_the_last_steps_however_they_end(
    base: Path, tmp_path: Path, write_rows: WriteRows, ends: dict[str, Any]
) -> None:
    data = write_rows("rows.jsonl", ROWS)
    chosen = {key: str(data) if key == "valid_path" else value for key, value in ends.items()}
    runs = [
        train(
            options(base, data, lora_config={"r": 2}, **{**chosen, "logging_steps": every}),
            output=tmp_path / str(every),
        )
        for every in (1, 10)
    ]
    each, last = ([line for line in lines_of(run.directory) if "loss" in line] for run in runs)
    assert [line["step"] for line in each] == [1, 2, 3, 4]
    assert [line["step"] for line in last] == [1, 4]
    assert last[1]["loss"] == pytest.approx(sum(line["loss"] for line in each[1:]) / 3, rel=1e-6)
    assert runs[1].final_train_loss == last[1]["loss"]
    assert last[1]["learning_rate"] == each[3]["learning_rate"]
    evaluated = [[line["step"] for line in lines_of(run.directory) if "eval_loss" in line] for run in runs]
    assert evaluated[0] == evaluated[1] == sorted(set(evaluated[0]))  # none twice


def test_run_that_is_there_is_not_replaced_unless_asked(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    lora = options(base, write_rows("r.jsonl", ROWS), lora_config={"r": 2})
    first = train(lora, output=tmp_path / "run")
    with pytest.raises(OutputError, match="already holds a run; give another --output, or --overwrite"):
        train(lora, output=tmp_path / "run")
    second = train({**lora, "lora_config": {"r": 4}}, output=tmp_path / "run", overwrite=True)
    assert second.summary["parameters"]["trainable"] == 2 * first.summary["parameters"]["trainable"]
    assert [line["step"] for line in lines_of(second.directory)] == [1, 3], "the first run's lines are gone"


def test_folder_of_other_things_is_left_alone(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    data = write_rows("r.jsonl", ROWS)
    with pytest.raises(OutputError, match="is not empty and holds no run"):
        train(options(base, data), output=tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        train(options(base, data), output=data)


def test_rest_of_a_broken_run_is_replaced(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    rest = tmp_path / "run"
    rest.mkdir()
    (rest / "metrics.jsonl").write_text('{"step": 1}\n')
    run = train(options(base, write_rows("r.jsonl", ROWS)), output=rest)
    assert '{"step": 1}\n' not in (run.directory / "metrics.jsonl").read_text()


def test_bad_data_is_told_before_anything_is_written(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    data = write_rows("r.jsonl", [*ROWS, {"prompt": "x"}])
    with pytest.raises(DataError, match="line 9: missing key 'completion'"):
        train(options(base, data), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_rows_of_another_format_are_refused(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    data, valid = write_rows("r.jsonl", ROWS), write_rows("v.jsonl", CHATS)
    with pytest.raises(DataError, match="valid_path has 8 problems"):
        train(options(base, data, valid_path=str(valid)), output=tmp_path / "run")


def test_mapping_with_a_typo_is_refused_like_a_file(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    with pytest.raises(ConfigError, match="sead: unknown key; did you mean seed"):
        train(options(base, write_rows("r.jsonl", ROWS), sead=1), output=tmp_path / "run")
