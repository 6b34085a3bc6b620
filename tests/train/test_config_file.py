"""A config is read whole: every problem with its key, its line and the nearest known key; nothing guessed in
silence."""

from pathlib import Path

import pytest

from loradock_adapters.errors import UsageError
from loradock_train.config import TrainConfig
from loradock_train.config_file import load_config
from loradock_train.config_sections import LoraOptions, Section, TokenizerOptions
from loradock_train.errors import ConfigError

MINIMAL = "model_id: org/model\ntrain_path: rows.jsonl\n"


def write(folder: Path, text: str) -> Path:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder: Path, text: str, *overrides: str) -> str:
    """The message of the error that this YAML gives."""
    with pytest.raises(UsageError) as caught:
        load_config(write(folder, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def load(folder: Path, text: str, *overrides: str) -> TrainConfig:
    return load_config(write(folder, text), overrides)[0]


# ---- what is read -------------------------------------------------------------------------------------------------


def test_seed_template_keys_are_accepted_as_they_stand(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
model_id: meta-llama/Meta-Llama-3-8B-Instruct
train_path: rows.jsonl
valid_path: rows.jsonl
context_length: 512
num_epochs: 3
train_batch_size_per_device: 16
eval_batch_size_per_device: 16
learning_rate: 1e-4
lora_config:
  r: 8
  lora_alpha: 16
  lora_dropout: 0.05
  target_modules: [q_proj, v_proj, k_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens, lm_head]
  modules_to_save: []
  bias: "none"
  fan_in_fan_out: false
  init_lora_weights: true
  task_type: "CAUSAL_LM"
""",
    )
    assert config.kind == "lora"
    assert config.learning_rate == 1e-4
    assert config.lora_config is not None
    assert config.lora_config.target_modules[-1] == "lm_head"
    assert config.train_path == (str(tmp_path / "rows.jsonl"),)


def test_lora_config_absent_means_full_parameter_training_with_the_lower_rate(tmp_path: Path) -> None:
    lora, full = load(tmp_path, MINIMAL + "lora_config: {}\n"), load(tmp_path, MINIMAL)
    assert (lora.kind, lora.peak_learning_rate) == ("lora", 1e-4)
    assert (full.kind, full.peak_learning_rate) == ("full", 1e-5)


def test_override_removes_a_section(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "lora_config: {r: 4}\n", "lora_config=null").kind == "full"


def test_override_with_dots_sets_one_key_of_a_section(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + "lora_config: {r: 4, lora_alpha: 32}\n", "lora_config.r=16", "learning_rate=2e-4")
    assert config.lora_config is not None
    assert (config.lora_config.r, config.lora_config.lora_alpha, config.learning_rate) == (16, 32, 2e-4)


def test_override_opens_a_section_that_is_not_there(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "lora_config.target_modules=[q_proj]")
    assert config.lora_config is not None
    assert config.lora_config.target_modules == ("q_proj",)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_number_with_exponent_is_a_number(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, MINIMAL + f"learning_rate: {text}\n").learning_rate == 1e-4


def test_no_limit_given_means_three_epochs(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).epoch_limit == 3
    assert load(tmp_path, MINIMAL + "max_time_s: 60\n").epoch_limit is None
    assert load(tmp_path, MINIMAL + "max_steps: 5\nnum_epochs: 1\n").epoch_limit == 1


def test_warmup_ratio_is_translated_with_a_notice(tmp_path: Path) -> None:
    config, notices = load_config(write(tmp_path, MINIMAL + "warmup_ratio: 0.03\n"))
    assert config.warmup_steps == 0.03
    assert notices == ["warmup_ratio: 0.03 is read as warmup_steps: 0.03 (below 1 it is a share of the run)"]


def test_warmup_ratio_beside_warmup_steps_is_refused(tmp_path: Path) -> None:
    assert "line 3, warmup_ratio: read as warmup_steps, which warmup_steps gives already; remove one" in complaint(
        tmp_path, MINIMAL + "warmup_ratio: 0.1\nwarmup_steps: 5\n"
    )


def test_run_directory_as_model_id_stands_for_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "base" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    config = load(tmp_path, "model_id: base\ntrain_path: rows.jsonl\n")
    assert config.model_id == str(checkpoint)


def test_chat_template_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert load(tmp_path, MINIMAL + "chat_template: t.jinja\n").chat_template == "{{ messages }}"


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


@pytest.mark.parametrize("section", [TrainConfig, LoraOptions, TokenizerOptions])
def test_every_field_is_documented(section: type[Section]) -> None:
    undocumented = [name for name, field in section.model_fields.items() if not field.description]
    assert undocumented == []


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once_with_line_and_nearest_key(tmp_path: Path) -> None:
    text = MINIMAL + "learning_rat: 1e-4\nnum_epochs: -1\nlora_config:\n  rank: 8\n  lora_alfa: 16\n  bias: some\n"
    message = complaint(tmp_path, text)
    assert "has 5 problems" in message
    assert "line 3, learning_rat: unknown key; did you mean learning_rate?" in message
    assert "line 4, num_epochs: must be greater than 0, got -1" in message
    assert "line 6, lora_config.rank: unknown key; known here: r, lora_alpha" in message
    assert "line 7, lora_config.lora_alfa: unknown key; did you mean lora_alpha?" in message
    assert "line 8, lora_config.bias: must be 'none', 'all' or 'lora_only', got 'some'" in message


def test_lora_key_at_the_top_is_told_where_it_belongs(tmp_path: Path) -> None:
    assert "line 3, r: unknown key; it belongs under lora_config: (lora_config.r)" in complaint(
        tmp_path, MINIMAL + "r: 8\n"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("num_epochs: three", "num_epochs: must be a valid number, got 'three'"),
        ("context_length: 512.5", "context_length: must be a valid integer, got 512.5"),
        ("context_length: '512'", "context_length: must be a valid integer, got '512'"),
        ("context_length: 4", "context_length: must be greater than or equal to 8, got 4"),
        ("packing: maybe", "packing: must be a valid boolean, got 'maybe'"),
        ("on_long_rows: cut", "on_long_rows: must be 'error', 'truncate' or 'drop', got 'cut'"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type: must be 'linear', 'cosine' or 'constant', got 'cosin'"),
        ("optim: adam", "optim: must be 'adamw_torch_fused'"),
        ("max_time_s: 0", "max_time_s: must be greater than 0, got 0"),
        ("seed: -1", "seed: must be greater than or equal to 0, got -1"),
        ("prompt_template: no field", "prompt_template must contain {instruction}"),
        ("lora_config: {r: 0}", "lora_config.r: must be greater than or equal to 1, got 0"),
        (
            "lora_config: {target_modules: q_proj}",
            "1 problem:\n  line 3, lora_config.target_modules: must be a list, got 'q_proj'; or must be 'all-linear' "
            "or a regular expression; for all modules of a name write [q_proj]",
        ),
        ("lora_config: {target_modules: '.*(q_proj'}", "a regular expression: missing ), unterminated"),
        (
            "lora_config: {target_modules: []}",
            "lora_config.target_modules: Value should have at least 1 item after validation, not 0; or must be",
        ),
        ("lora_config: {init_lora_weights: pissa}", "lora_config.init_lora_weights"),
        ("tokenizer: {train_vocab_size: 512}", "tokenizer belongs to model (from scratch)"),
        ("valid_path: absent.jsonl", "valid_path: no such file or directory"),
        ("chat_template: absent.jinja", "chat_template: no such file"),
    ],
)
def test_wrong_value_names_its_key(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in complaint(tmp_path, MINIMAL + line + "\n")


def test_neither_model_nor_model_id_is_refused(tmp_path: Path) -> None:
    assert "give exactly one of model_id" in complaint(tmp_path, "train_path: rows.jsonl\n")


def test_missing_train_path_is_named(tmp_path: Path) -> None:
    assert "train_path: required, but not given" in complaint(tmp_path, "model_id: org/model\n")


def test_model_from_scratch_without_tokenizer_is_refused(tmp_path: Path) -> None:
    message = complaint(tmp_path, "model: {model_type: llama}\ntrain_path: rows.jsonl\n")
    assert "model (from scratch) needs tokenizer" in message


def test_model_from_scratch_with_lora_is_refused(tmp_path: Path) -> None:
    text = "model: {model_type: llama}\ntokenizer: {train_vocab_size: 400}\nlora_config: {}\ntrain_path: rows.jsonl\n"
    assert "a model from scratch has nothing to adapt" in complaint(tmp_path, text)


@pytest.mark.parametrize("tokenizer", ["{}", "{path: a, train_vocab_size: 400}"])
def test_tokenizer_without_exactly_one_source_is_refused(tmp_path: Path, tokenizer: str) -> None:
    text = f"model: {{model_type: llama}}\ntokenizer: {tokenizer}\ntrain_path: rows.jsonl\n"
    assert "line 2, tokenizer: give exactly one of path and train_vocab_size" in complaint(tmp_path, text)


def test_absent_data_file_is_named_with_its_path(tmp_path: Path) -> None:
    message = complaint(tmp_path, "model_id: org/model\ntrain_path: [rows.jsonl, gone.jsonl]\n")
    assert f"train_path: no such file or directory: {tmp_path / 'gone.jsonl'}" in message


def test_model_path_that_is_absent_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    assert "model_id: no such directory" in complaint(tmp_path, "model_id: ./gone\ntrain_path: rows.jsonl\n")


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    assert "config.yaml, line 3: not valid YAML" in complaint(tmp_path, MINIMAL + "seed: a: 1\n")


def test_key_given_twice_names_the_line(tmp_path: Path) -> None:
    message = complaint(tmp_path, MINIMAL + "seed: 1\nseed: 2\n")
    assert "line 4" in message
    assert "seed" in message


def test_key_given_twice_with_one_value_is_taken(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "seed: 3\npacking: true\nseed: 3\n").seed == 3


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "expected" in complaint(tmp_path, text)


def test_absent_config_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rate", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed.inner=3", "seed is 1, not a section"),
        ("seed=[1", "is not a YAML value"),
        ("sed=3", "sed: unknown key; did you mean seed?"),
    ],
)
def test_malformed_override_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in complaint(tmp_path, MINIMAL + "seed: 1\n", override)


def test_config_error_holds_its_problems_for_programs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL + "seed: x\n"))
    assert [problem.where for problem in caught.value.problems] == ["line 3, seed"]
