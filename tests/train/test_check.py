"""`loradock check`: its verdict beforehand is the gate's verdict on what the run then exports; and what it proposes."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loradock_adapters.base import base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.cli import run as loradock
from loradock_adapters.engine_rules import DEFAULT_MAX_LORA_RANK, EngineLimits
from loradock_adapters.errors import UsageError
from loradock_adapters.gate import judge
from loradock_testing.tiny_models import make_tokenizer
from loradock_train import load_config, train
from loradock_train.check import check
from loradock_train.starting import check_start

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(4)]
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model of each architecture."""
    folder = tmp_path_factory.mktemp("bases")
    made = {}
    for family, sizes in SIZES.items():
        directory = folder / family
        tokenizer = make_tokenizer(directory)
        widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        heads = {"num_key_value_heads": 1, "max_position_embeddings": 128}
        given = sizes if family == "gpt2" else widths | heads | sizes
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config: Any = AutoConfig.for_model(family, vocab_size=len(tokenizer) + 8, **ids, **given)
        torch.manual_seed(0)
        cast(Any, AutoModelForCausalLM).from_config(config).save_pretrained(directory)
        made[family] = directory
        if family == "qwen2":  # whose tokenizer class adds a token to the file that it reads
            made["drifted"] = Path(shutil.copytree(directory, folder / "drifted"))
            AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    return made


def write_config(folder: Path, base: Path, lora: dict[str, Any] | None, **values: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = {
        "model_id": str(base), "train_path": "rows.jsonl", "context_length": 64, "max_steps": 1, "learning_rate": 0.1,
        "mixed_precision": "no", **values,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text("# mine\n" + json_lines(given | ({} if lora is None else {"lora_config": lora})))
    return path


def json_lines(values: dict[str, Any]) -> str:
    return "".join(f"{key}: {json.dumps(value)}  # {key}\n" for key, value in values.items())


LISTED = ["q_proj", "embed_tokens", "lm_head"]
MATRIX: list[tuple[str, dict[str, Any] | None, str]] = [
    ("llama", {"r": 8}, "shared"),
    ("llama", {"r": 48, "target_modules": LISTED}, "shared"),
    ("llama", {"r": 300}, "dedicated"),
    ("llama", {"use_dora": True}, "dedicated"),
    ("llama", {"modules_to_save": ["lm_head"]}, "dedicated"),
    ("llama", {"use_rslora": True, "r": 4}, "shared"),
    ("llama", {"r": 4, "rank_pattern": {"q_proj": 80}}, "dedicated"),
    ("llama", None, "dedicated"),
    ("mistral", {"r": 4, "target_modules": LISTED}, "dedicated"),
    ("mistral", {"r": 4, "use_dora": True, "modules_to_save": ["embed_tokens"]}, "dedicated"),
    ("qwen2", {"r": 48}, "shared"),
    ("drifted", {"r": 8}, "rejected"),
    ("qwen2", {"bias": "all"}, "dedicated"),
    ("qwen2", {"bias": "lora_only", "r": 8}, "dedicated"),
    ("qwen2", None, "dedicated"),
    ("gpt2", {"r": 8}, "dedicated"),
    ("gpt2", {"r": 8, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}, "dedicated"),
    ("gpt2", {"r": 300, "target_modules": ["c_attn"], "bias": "all"}, "dedicated"),
    ("gpt2", None, "dedicated"),
]


@pytest.mark.parametrize(("family", "lora", "placement"), MATRIX)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_verdict_beforehand_is_the_gates_on_what_the_run_exports(
    bases: dict[str, Path], tmp_path: Path, family: str, lora: dict[str, Any] | None, placement: str
) -> None:
    config = write_config(tmp_path, bases[family], lora)
    report = check(config)
    assert report.problems == []
    assert report.forecast is not None
    run = train(config, output=tmp_path / "run")
    found = read_checkpoint(run.checkpoint)
    verdict = judge(found, base_from(bases[family]), EngineLimits(DEFAULT_MAX_LORA_RANK))
    said = report.forecast.verdict
    assert (said.kind, said.placement, said.rank) == (verdict.kind, verdict.placement, verdict.rank)
    assert said.placement == placement
    assert said.reasons == verdict.reasons
    assert report.forecast.checkpoint_bytes == sum(info.size_bytes for info in found.tensors.values())
    assert report.forecast.line() in run.summary["notices"]
    assert report.exit_code == (0 if lora is None or placement == "shared" else 1)
    if family not in ("gpt2", "drifted") and lora is not None and placement != "shared":  # no config mends those
        assert report.rewritten is not None
        assert report.rewritten.verdict.placement == "shared"
        assert report.rewritten.checkpoint_bytes <= report.forecast.checkpoint_bytes


# ---- rewrites -------------------------------------------------------------------------------------------------------


def changed(report: Any) -> dict[str, tuple[Any, Any]]:
    return {change.key: (change.old, change.new) for change in report.needed}


def test_rank_is_lowered_to_the_limit_and_alpha_keeps_the_scale(bases: dict[str, Path], tmp_path: Path) -> None:
    report = check(write_config(tmp_path, bases["llama"], {"r": 256, "lora_alpha": 32, "target_modules": ["q_proj"]}))
    assert changed(report) == {"lora_config.r": (256, 64), "lora_config.lora_alpha": (32, 8)}
    rs = check(
        write_config(tmp_path, bases["llama"], {"r": 256, "lora_alpha": 32, "use_rslora": True}),
    )
    assert changed(rs)["lora_config.lora_alpha"] == (32, 16), "by the root of the rank"


def test_modules_saved_whole_become_targets_where_the_engine_takes_them(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    report = check(write_config(tmp_path, bases["llama"], lora))
    assert changed(report) == {
        "lora_config.modules_to_save": (("lm_head",), ()),
        "lora_config.target_modules": (("q_proj",), ("q_proj", "lm_head")),
    }
    assert report.rewritten is not None
    assert report.forecast is not None
    assert report.rewritten.checkpoint_bytes < report.forecast.checkpoint_bytes


def test_modules_that_cannot_be_adapted_are_dropped(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = {"r": 8, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    report = check(write_config(tmp_path, bases["gpt2"], lora))
    assert changed(report) == {"lora_config.modules_to_save": (("ln_f",), ())}


def test_tied_matrices_leave_the_targets(bases: dict[str, Path], tmp_path: Path) -> None:
    report = check(write_config(tmp_path, bases["qwen2"], {"r": 8, "target_modules": LISTED}))
    assert report.exit_code == 2
    assert "one tied matrix" in report.problems[0].message
    assert changed(report) == {"lora_config.target_modules": (tuple(LISTED), ("q_proj",))}
    assert report.rewritten is not None
    assert report.rewritten.is_as_expected


def test_rank_between_two_steps_is_advice_and_not_a_fault(bases: dict[str, Path], tmp_path: Path) -> None:
    report = check(write_config(tmp_path, bases["llama"], {"r": 48, "lora_alpha": 12}))
    assert report.exit_code == 0
    (change,) = report.changes
    assert (change.key, change.old, change.new, change.is_optional) == ("lora_config.r", 48, 64, True)
    assert "lora_alpha: 16" in change.effect


def test_written_config_keeps_comments_and_is_fine(bases: dict[str, Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, bases["llama"], None)
    config.write_text(config.read_text() + "lora_config:\n  r: 300 # much\n  modules_to_save:\n  - lm_head\n  # end\n")
    fixed = tmp_path / "fixed.yaml"
    assert loradock(["check", str(config), "--write", str(fixed), "--set", "seed=7"]) == 1
    text = fixed.read_text()
    assert text.startswith("# mine\n")
    assert "  r: 64 # much\n" in text
    assert "  modules_to_save: []\n" in text
    assert "  # end\n" in text
    loaded, _ = load_config(fixed)
    assert loaded.seed == 7
    assert loradock(["check", str(fixed)]) == 0


def test_config_written_to_another_folder_finds_its_data(bases: dict[str, Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, bases["llama"], {"r": 300})
    there = tmp_path / "there"
    there.mkdir()
    assert loradock(["check", str(config), "--write", str(there / "run.yaml")]) == 1
    assert load_config(there / "run.yaml")[0].train_path == load_config(config)[0].train_path


def test_write_refuses_another_file_that_is_there(bases: dict[str, Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, bases["llama"], {"r": 300})
    other = tmp_path / "other.yaml"
    other.write_text("mine")
    assert loradock(["check", str(config), "--write", str(other)]) == 2
    assert other.read_text() == "mine"


# ---- data and broken input ----------------------------------------------------------------------------------------


def test_data_and_model_faults_are_told_together(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, bases["llama"], {"target_modules": ["q_porj"]}, context_length=8)
    assert loradock(["check", str(config), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["placement"] is None
    wheres = [problem["where"] for problem in document["problems"]]
    assert wheres[0].endswith("rows.jsonl, line 1")
    assert wheres[-1] == "model"
    assert "no module 'q_porj'" in document["problems"][-1]["message"]
    assert any(advice.startswith("context_length: 64 takes every row whole") for advice in document["advice"])


def test_broken_row_is_named_by_file_and_line(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, bases["llama"], {"r": 4})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "p"}\n')
    assert loradock(["check", str(config)]) == 2
    assert "rows.jsonl, line 5" in capsys.readouterr().err


def test_typo_is_told_with_its_line(tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, bases["llama"], None, learning_rat=1)
    assert loradock(["check", str(config)]) == 2
    assert "did you mean learning_rate?" in capsys.readouterr().err


def test_architecture_that_the_engine_lacks_is_refused(tmp_path: Path, bases: dict[str, Path]) -> None:
    model = {"model_type": "xglm", "d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32}
    config = write_config(tmp_path, bases["llama"], None, model=model, tokenizer={"train_vocab_size": 300})
    config.write_text("".join(line for line in config.read_text().splitlines(True) if not line.startswith("model_id")))
    report = check(config)
    assert report.forecast is not None
    assert report.forecast.verdict.placement == "rejected"
    assert report.exit_code == 1
    assert "XGLMForCausalLM" in report.forecast.line()


def test_stream_and_classification_head_are_checked_by_their_own_data_code(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    streamed = check(write_config(tmp_path, bases["llama"], {"r": 8}, streaming=True))
    assert (streamed.problems, streamed.exit_code) == ([], 0)
    (tmp_path / "head").mkdir()
    task = {"kind": "sequence_classification", "labels": [f"return {i}" for i in range(4)]}
    config = write_config(tmp_path / "head", bases["llama"], None, task=task, valid_path="rows.jsonl")
    lines = [json.dumps({"text": f"text {i}", "label": f"return {i}"}) + "\n" for i in range(4)]
    (tmp_path / "head" / "rows.jsonl").write_text("".join(lines))
    headed = check(config)
    assert (headed.problems, headed.forecast, headed.exit_code) == ([], None, 0)
    assert any("classification head" in notice for notice in headed.notices)


# ---- what training refuses at its start -----------------------------------------------------------------------------

HEAD = {"kind": "sequence_classification", "labels": ["a", "b"]}


@pytest.mark.parametrize(
    "values",
    [
        {"fsdp": {}},
        {"fsdp": {}, "optim": "adafactor", "num_devices": 1},
        {"report_to": "mlflow"},
        {"preference": {}},
        {"optim": "paged_adamw_8bit"},
    ],
    ids=["fsdp in one process", "fsdp with a number", "tracker", "preference", "optimiser"],
)
def test_what_training_refuses_at_its_start_is_refused_in_the_same_words(
    bases: dict[str, Path], tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loradock_train.trackers.find_spec", lambda _name: None)
    if torch.cuda.is_available() and "optim" in values and "fsdp" not in values:
        pytest.skip("this machine has what is refused elsewhere")
    config = write_config(tmp_path, bases["llama"], {"r": 4}, **values)
    report = check(config)
    assert report.exit_code == 2
    with pytest.raises(UsageError) as refused:
        train(config, output=tmp_path / "run")
    told = [problem.message for problem in report.problems]
    assert any(message in str(refused.value) for message in told), (told, str(refused.value))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preference": {}}, "preference: trains in one process"),
        ({"task": HEAD, "valid_path": "rows.jsonl"}, "a classification head trains in one process"),
        ({"on_out_of_memory": "adapt"}, "on_out_of_memory: adapt works with one process, this run has 2"),
        ({"fsdp": {}, "best_by": "eval_loss", "valid_path": "rows.jsonl"}, "fsdp needs a run without best_by"),
    ],
    ids=["preference", "head", "adapt", "best"],
)
def test_what_several_processes_cannot_do_is_refused_by_their_number(
    bases: dict[str, Path], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    config = write_config(tmp_path, bases["llama"], {"r": 4}, num_devices=2, **values)
    report = check(config)
    assert any(message in problem.message for problem in report.problems)
    with pytest.raises(UsageError, match=message):
        check_start(load_config(config)[0], 2)


def test_division_over_processes_is_fine_for_as_many_as_are_asked_for(bases: dict[str, Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, bases["llama"], {"r": 4}, fsdp={})
    assert loradock(["check", str(config)]) == 2
    assert loradock(["check", str(config), "--nproc", "2"]) == 0
    assert loradock(["check", str(config), "--set", "num_devices=2"]) == 0
