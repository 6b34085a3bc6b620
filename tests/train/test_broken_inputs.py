"""Broken configs and data, through the real command line: each is named where it is, by a message of its own, with exit
code 2 and no traceback, and nothing is written.

A row of a table is a case; whoever adds a key or a format adds his rows. `{here}` is the folder of the config.
"""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.cli import run

GOOD = '{"prompt": "a", "completion": "b"}\n'
HEAD = "model_id: base\ntrain_path: rows.jsonl\n"
VALID = "valid_path: rows.jsonl\n"
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@dataclass(frozen=True)
class Broken:
    """One thing that is wrong."""

    name: str
    config: str
    expected: str
    """Place and message, as it is printed."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Beside the config; rows.jsonl is a good one where none is given."""


def config(name: str, text: str, expected: str, **files: str) -> Broken:
    """Keys below the two good lines of HEAD."""
    return Broken(name, HEAD + text + "\n", expected, files)


def rows(name: str, content: str | bytes, expected: str, extra: str = "") -> Broken:
    return Broken(name, HEAD + extra, f"{{here}}/rows.jsonl{expected}", {"rows.jsonl": content})


def chat(name: str, expected: str, *messages: Any, **keys: Any) -> Broken:
    return rows(name, json.dumps({"messages": messages, **keys}) + "\n", f", line 1: {expected}")


LONG = json.dumps({"prompt": "def f(x): " * 9, "completion": "b"}) + "\n"

CONFIGS = [
    Broken("yaml", "model_id: [base\n", "c.yaml, line 2: not valid YAML: expected ',' or ']'"),
    Broken("no mapping", "- a\n", "c.yaml: expected keys and values, found a list"),
    config("key twice", "seed: 1\nseed: 2", "c.yaml, line 4: not valid YAML: the key 'seed' stands twice"),
    config(
        "pattern of modules",
        "lora_config: {target_modules: '.*(q_proj'}",
        "line 3, lora_config.target_modules: must be a list, got",
    ),
    config("similarity of nothing", "similarity: {}", "similarity needs similarity.path or valid_path"),
    config("similarity key", "similarity: {max_token: 3}", "line 3, similarity.max_token: unknown key; did you mean"),
    config("typo", "learning_rat: 1", "line 3, learning_rat: unknown key; did you mean learning_rate?"),
    config("key of a section", "lora_alpha: 1", "line 3, lora_alpha: unknown key; it belongs under lora_config:"),
    config("negative", "num_epochs: -1", "line 3, num_epochs: must be greater than 0, got -1"),
    config("text for a number", "context_length: long", "line 3, context_length: must be a valid integer, got 'long'"),
    config("text for a switch", "packing: maybe", "line 3, packing: must be a valid boolean, got 'maybe'"),
    config("choice", "on_long_rows: cut", "line 3, on_long_rows: must be 'error', 'truncate' or 'drop', got 'cut'"),
    config("padding", "padding: widest", "line 3, padding: must be 'longest' or 'max_length', got 'widest'"),
    config("side", "padding_side: middle", "line 3, padding_side: must be 'right' or 'left', got 'middle'"),
    config(
        "scheduler", "lr_scheduler_type: step", "line 3, lr_scheduler_type: must be 'linear', 'cosine' or 'constant'"
    ),
    config("optimiser", "optim: adam", "line 3, optim: must be 'adamw_torch_fused', 'adamw_torch', 'adamw_8bit'"),
    config("price", "price_per_hour: -1", "line 3, price_per_hour: must be greater than or equal to 0, got -1"),
    config(
        "tracker", "report_to: wandb2", "line 3, report_to: must be 'tensorboard', 'wandb' or 'mlflow', got 'wandb2'"
    ),
    config("template", "prompt_template: 'no'", "line 3, prompt_template: prompt_template must contain {instruction}"),
    config("not a number", "learning_rate: .inf", "line 3, learning_rate: must be a finite number"),
    config(
        "rank of a module",
        "lora_config: {rank_pattern: {q_proj: 0}}",
        "line 3, lora_config.rank_pattern: must be greater than or equal to 1, got 0",
    ),
    config(
        "expression of a rank",
        "lora_config: {rank_pattern: {'(q': 4}}",
        "'(q' is no regular expression: missing ), unterminated",
    ),
    config(
        "template that is a name",
        "chat_template: chatml",
        "line 3, chat_template: chat_template is neither a Jinja template",
    ),
    config("template file", "chat_template: a.jinja", "line 3, chat_template: no such file: {here}/a.jinja"),
    config("resources", "worker_resources: {GPU: x}", "line 3, worker_resources: must be a valid number, got 'x'"),
    config("old key", "num_train_epochs: 0", "line 3, num_train_epochs: must be greater than 0, got 0"),
    config("old and new", "save_total_limit: 3\nkeep: 2", "line 3, save_total_limit: read as keep, which keep gives"),
    config("two types", "fp16: true\nbf16: true", "line 3, fp16: read as mixed_precision, which bf16 gives already"),
    config("zero", "deepspeed: a.json", "line 3, deepspeed: no such file: {here}/a.json"),
    config("strategy", "eval_strategy: steps", "line 3, eval_strategy: steps, but no eval_steps"),
    Broken("no data key", "model_id: base\n", "train_path: required, but not given"),
    Broken("no model", "train_path: rows.jsonl\n", "config: give exactly one of model_id (train an existing model)"),
    Broken("data not there", "model_id: base\ntrain_path: a.jsonl\n", "line 2, train_path: no such file or directory"),
    Broken(
        "model not there", "model_id: ./a\ntrain_path: rows.jsonl\n", "line 1, model_id: no such directory: {here}/a"
    ),
    config(
        "tokenizer too much", "tokenizer: {path: base}", "line 3, tokenizer: tokenizer belongs to model (from scratch)"
    ),
    Broken(
        "no tokenizer",
        "train_path: rows.jsonl\nmodel: {model_type: llama}\n",
        "line 2, model: model (from scratch) needs",
    ),
    # ---- sections
    config(
        "lora typo",
        "lora_config:\n  lora_alfa: 3",
        "line 4, lora_config.lora_alfa: unknown key; did you mean lora_alpha?",
    ),
    config("lora no section", "lora_config: [r]", "line 3, lora_config: must be a section of keys and values"),
    config("rank", "lora_config: {r: 0}", "line 3, lora_config.r: must be greater than or equal to 1, got 0"),
    config(
        "dropout", "lora_config: {lora_dropout: 1.5}", "line 3, lora_config.lora_dropout: must be less than 1, got 1.5"
    ),
    config(
        "bits",
        "lora_config: {}\nquantisation: {load_in: 2bit}",
        "line 4, quantisation.load_in: must be '4bit' or '8bit'",
    ),
    config(
        "bits of a full run", "quantisation: {load_in: 4bit}", "line 3, quantisation: quantisation keeps a frozen base"
    ),
    config("ratio", "lora_config: {loraplus_lr_ratio: 0.5}", "line 3, lora_config.loraplus_lr_ratio: must be greater"),
    config("pattern", "trainable: ['(k']", "line 3, trainable: '(k' is no regular expression: missing ), unterminated"),
    config(
        "pattern of an adapter",
        "trainable: [q]\nlora_config: {}",
        "line 3, trainable: trainable belongs to full-parameter",
    ),
    config("task's rows", "task: {kind: generation}", "line 3, task: task needs valid_path: the rows that are scored"),
    config(
        "task kind", VALID + "task: {kind: classify}", "line 4, task.kind: must be 'classification', 'sequence_class"
    ),
    config("labels", VALID + "task: {kind: classification}", "line 4, task: task.kind classification needs labels"),
    config(
        "patience", VALID + "early_stopping: {patience: 0}", "line 4, early_stopping.patience: must be greater than"
    ),
    config(
        "best by", VALID + "best_by: accuracy", "line 4, best_by: best_by accuracy: this run has eval_loss; task: gives"
    ),
    Broken(
        "vocabulary",
        "train_path: rows.jsonl\nmodel: {model_type: llama}\ntokenizer: {train_vocab_size: 3}\n",
        "line 3, tokenizer.train_vocab_size: must be greater than or equal to 300, got 3",
    ),
    Broken(
        "tokenizer twice",
        "train_path: rows.jsonl\nmodel: {model_type: llama}\ntokenizer: {train_vocab_size: 300, path: base}\n",
        "line 3, tokenizer: give exactly one of path and train_vocab_size",
    ),
    config(
        "metric of another task",
        VALID + "task: {kind: summarisation, metric: accuracy}",
        "task: metric accuracy is not one of summarisation: rougeL, rouge1, rouge2",
    ),
    config("sweep of nothing", "sweep: [{name: a}]", "line 3, sweep: sweep trains adapters on one frozen base"),
    config("sweep's key", "lora_config: {}\nsweep: [{name: a, lr: 1}]", "line 4, sweep: unknown key lr of entry 1"),
    config("no adapter there", "adapter_path: nowhere", "adapter_path: no adapter_config.json in"),
]

FILES = [
    Broken(
        "ending", "model_id: base\ntrain_path: a.csv\n", "{here}/a.csv: expected a .jsonl or .txt", {"a.csv": "a,b"}
    ),
    Broken("folder", "model_id: base\ntrain_path: d\n", "{here}/d: no .jsonl or .txt file in this", {"d/a.md": "a"}),
    Broken(
        "gzip cut",
        "model_id: base\ntrain_path: a.jsonl.gz\n",
        "{here}/a.jsonl.gz: byte 70: ends in the middle",
        {"a.jsonl.gz": gzip.compress(GOOD.encode() * 100, mtime=0)[:-12]},
    ),
    Broken(
        "no gzip",
        "model_id: base\ntrain_path: a.jsonl.gz\n",
        "incorrect header check",
        {"a.jsonl.gz": GOOD},
    ),
    rows("no rows", "\n\n", ": no rows"),
    rows("bytes", GOOD.encode() + b'{"prompt": "\xff"}\n', ", line 2: not valid UTF-8"),
    rows("json", GOOD + '{"prompt": "a",}\n', ", line 2: not valid JSON: "),
    rows(
        "key twice in a row", GOOD + '{"prompt": "a", "completion": "b", "prompt": "c"}\n', ", line 2: the key 'prompt'"
    ),
    rows(
        "digits", f'{{"prompt": "a", "completion": "b", "n": {"9" * 5000}}}\n', ", line 1: not valid JSON: a number of"
    ),
    rows("brackets", "[" * 100_000 + "\n", ", line 1: not valid JSON: brackets within brackets"),
    rows(
        "half a character",
        GOOD + '{"prompt": "\\ud83d!", "completion": "b"}\n',
        ", line 2: not valid Unicode: \\ud83d is half of a character",
    ),
    rows(
        "input without a place",
        '{"instruction": "do", "output": "a"}\n{"instruction": "do", "input": "it", "output": "a"}\n',
        ", line 2: has an input, and prompt_template has no place for it",
        "prompt_template: 'Q: {instruction} A: '\n",
    ),
    rows("array", GOOD + "[1]\n", ", line 2: expected a JSON object, found list"),
    rows(
        "no format",
        '{"question": "a"}\n',
        ", line 1: no messages, instruction, prompt or text key (its keys: question)",
    ),
    rows("two formats", '{"prompt": "a", "text": "c"}\n', ", line 1: has keys of several formats (prompt, text)"),
    rows("mixed", GOOD + '{"text": "c"}\n', ", line 2: the first text row"),
    rows("other format", GOOD, ", line 1: missing key 'messages'", "format: chat\n"),
    rows("completion missing", GOOD + '{"prompt": "a"}\n', ", line 2: missing key 'completion'"),
    rows("completion type", '{"prompt": "a", "completion": 3}\n', ", line 1: 'completion' must be a string, found int"),
    rows("completion empty", '{"prompt": "a", "completion": ""}\n', ", line 1: completion is empty: there is nothing"),
    rows("output missing", '{"instruction": "a"}\n', ", line 1: missing key 'output'"),
    rows(
        "output empty", '{"instruction": "a", "output": ""}\n', ", line 1: output is empty: there is nothing to learn"
    ),
    rows(
        "input type", '{"instruction": "a", "input": [], "output": "b"}\n', ", line 1: 'input' must be a string, found"
    ),
    rows("text type", '{"text": null}\n', ", line 1: 'text' must be a string, found NoneType"),
    rows("long", LONG, ", line 1: 49 tokens are over context_length 8", "context_length: 8\n"),
    rows(
        "cut off",
        LONG,
        ", line 1: cut to context_length 8, nothing of the answer is left (49 tokens)",
        "context_length: 8\non_long_rows: truncate\n",
    ),
    Broken(
        "all left out",
        HEAD + "context_length: 8\non_long_rows: drop\n",
        "train_path: no row fits into 8 tokens",
        {"rows.jsonl": LONG},
    ),
    Broken(
        "validation",
        HEAD + "valid_path: v.jsonl\n",
        "{here}/v.jsonl, line 1: missing key 'prompt'",
        {"v.jsonl": '{"text": "c"}\n'},
    ),
    chat(
        "image from the web",
        "messages[0].content[0]: images are not fetched from https:// addresses",
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]},
        ANSWER,
    ),
    chat(
        "image that is missing",
        "messages[0].content[0]: no such image file: {here}/no.png",
        {"role": "user", "content": [{"type": "image", "path": "no.png"}]},
        ANSWER,
    ),
    chat("no messages", "'messages' must be a non-empty list"),
    chat("message", "messages[0]: expected an object, found str", "hi"),
    chat(
        "role", "messages[0]: invalid role 'robot'; expected one of system", {"role": "robot", "content": "x"}, ANSWER
    ),
    chat("content", "messages[0]: missing or non-string 'content'", {"role": "user"}, ANSWER),
    chat("no answer", "Example has no assistant message to learn from (at least one with weight 1 is needed)", USER),
    chat(
        "answer to nothing", "messages[0]: an answer that nothing comes before is never asked for", ANSWER, USER, ANSWER
    ),
    chat("weight", "messages[1]: 'weight' must be 0 or 1", USER, {**ANSWER, "weight": 0.5}),
    chat("weight of a user", "messages[0]: 'weight' must be 0 or 1, and on assistant", {**USER, "weight": 1}, ANSWER),
    chat("tools", "'tools' must be a list, found str", USER, ANSWER, tools="f"),
    chat("tool", "Missing required parameter: 'tools[0].function'.", USER, ANSWER, tools=[{"type": "function"}]),
    chat(
        "call",
        "Missing required parameter: 'messages[1].tool_calls[0].function'.",
        USER,
        {"role": "assistant", "tool_calls": [{"id": "1"}]},
    ),
    chat(
        "result",
        "messages[1]: messages with role 'tool' must be a response",
        USER,
        {"role": "tool", "content": "x"},
        ANSWER,
    ),
]

SCRATCH = "train_path: rows.jsonl\ntokenizer: {train_vocab_size: 300}\n"
MODELS = [
    Broken(
        "hollow", "model_id: ./d\ntrain_path: rows.jsonl\n", "model_id {here}/d: no model could be loaded", {"d/a": ""}
    ),
    Broken(
        "config.json", "model_id: ./d\ntrain_path: rows.jsonl\n", "is not a valid JSON file", {"d/config.json": "{"}
    ),
    Broken(
        "family",
        "model_id: ./d\ntrain_path: rows.jsonl\n",
        "has model type `home_made`",
        {"d/config.json": '{"model_type": "home_made"}'},
    ),
    config("context", "context_length: 4096", "context_length 4096 is over the model's max_position_embeddings 512"),
    config(
        "target",
        "lora_config: {target_modules: [query]}",
        "lora_config.target_modules: no module 'query' in this model",
    ),
    config(
        "saved module",
        "lora_config: {modules_to_save: [lm_haed]}",
        "lora_config.modules_to_save: no module 'lm_haed' in this model; it has",
    ),
    config(
        "excluded module",
        "lora_config: {exclude_modules: [q_prj]}",
        "lora_config.exclude_modules: no module 'q_prj' in this model; it has",
    ),
    config(
        "rank of nothing",
        "lora_config: {target_modules: [q_proj], rank_pattern: {k_proj: 4}}",
        "lora_config.rank_pattern: no module with an adapter matches 'k_proj'; those with one are q_proj",
    ),
    config("template's syntax", "chat_template: '{% for'", "chat_template, line 1 of it: not valid Jinja: "),
    config(
        "pattern finds nothing", "trainable: [atention]", "trainable: no parameter of this model has 'atention' in its"
    ),
    Broken(
        "tied",
        "model_id: tied\ntrain_path: rows.jsonl\nlora_config: {target_modules: [lm_head]}\n",
        "lora_config.target_modules: lm_head cannot be adapted here: the embedding and head of this model are one tied",
    ),
    Broken("type", SCRATCH + "model: {model_type: lama}\n", "model.model_type: 'lama' is no causal language model"),
    Broken(
        "field", SCRATCH + "model: {model_type: llama, hidden_sise: 3}\n", "model.hidden_sise: unknown field of llama"
    ),
    Broken("entries", SCRATCH + "model: {model_type: llama, vocab_size: 9}\n", "model.vocab_size: 9 is less than the"),
    config(
        "output taken", "output_dir: d", "d is not empty and holds no run; give another --output", **{"d/notes": "x"}
    ),
    config(
        "output a file",
        "output_dir: a.txt",
        "the output a.txt is a file; give a directory with --output",
        **{"a.txt": "x"},
    ),
]

BROKEN = [*CONFIGS, *FILES, *MODELS]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loradock_testing.tiny_models import make_llama

    return make_llama(tmp_path_factory.mktemp("tied") / "tied", tied=True)


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_broken_input_is_named_where_it_is(
    case: Broken, base: Path, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "tied").symlink_to(tied)
    for name, content in {"rows.jsonl": GOOD, **case.files, "c.yaml": case.config}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    code = run(["train", "c.yaml"])

    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert case.expected.replace("{here}", str(tmp_path)) in printed.err
    assert printed.err.startswith("error: ")
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_every_case_has_a_name_and_a_message_of_its_own() -> None:
    assert len(BROKEN) >= 40
    assert len({case.name for case in BROKEN}) == len(BROKEN)
    messages = [case.expected for case in BROKEN]
    assert [one for one in messages if sum(one in other for other in messages) > 1] == []
