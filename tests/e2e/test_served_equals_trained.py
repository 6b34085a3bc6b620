"""What `loradock train` made is what the server answers: every token of transformers + PEFT, for each kind of
checkpoint.

One real engine, float32, greedy. Wrong means: at the first token that differs, the reference's two best logits are
further apart than a near tie.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loradock_testing.loradock_server import LoradockServer
from loradock_testing.tiny_models import ALL_MODULES, LINEAR_MODULES, make_adapter, reference
from loradock_testing.trained import PROMPTS, Trained

pytestmark = pytest.mark.engine

MAX_TOKENS = 24


def assert_same_tokens(server: LoradockServer, model: str, base: Path, adapter: Path | None) -> None:
    expected = reference(base, adapter, PROMPTS, MAX_TOKENS)
    wrong = [
        prompt
        for prompt, answer in zip(PROMPTS, expected, strict=True)
        if answer.is_contradicted_by(server.tokens(model, prompt, MAX_TOKENS))
    ]
    assert wrong == []


def differing(server: LoradockServer, one: str, other: str) -> int:
    """On how many prompts two models answer differently: equal tokens prove nothing if all models say the same."""
    return sum(server.tokens(one, prompt, 8) != server.tokens(other, prompt, 8) for prompt in PROMPTS)


def test_base_answers_as_transformers_does(server: LoradockServer, trained: Trained) -> None:
    assert server.card("tiny-llama")["kind"] == "base"
    assert_same_tokens(server, "tiny-llama", trained.base, None)


def test_adapter_on_linear_layers_answers_as_peft_does(server: LoradockServer, trained: Trained) -> None:
    assert server.card("linear")["placement"] == "shared"
    assert differing(server, "linear", "base") >= 18
    assert_same_tokens(server, "linear", trained.base, trained.linear / "checkpoint")


def test_adapter_on_the_seeds_whole_list_is_small_hot_swapped_and_right(
    server: LoradockServer, trained: Trained
) -> None:
    checkpoint = trained.whole_list / "checkpoint"
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(".lora_" in name for name in names), "base matrices in an adapter file"
    assert {"embed_tokens" in name for name in names} == {True, False}
    assert any("lm_head" in name for name in names)
    adapter_bytes = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert adapter_bytes < (trained.base / "model.safetensors").stat().st_size / 4
    assert server.card("whole-list")["placement"] == "shared"
    assert differing(server, "whole-list", "base") >= 18
    assert differing(server, "whole-list", "linear") >= 18
    assert_same_tokens(server, "whole-list", trained.base, checkpoint)


def test_full_model_is_dedicated_and_answers_as_transformers_does(server: LoradockServer, trained: Trained) -> None:
    assert server.card("full")["placement"] == "dedicated"
    assert differing(server, "full", "base") >= 18
    assert_same_tokens(server, "full", trained.full / "checkpoint", None)
    assert server.card("full")["state"] == "ready"


DEDICATED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "modules-to-save": {"modules_to_save": ["lm_head", "norm"]},
    "rank-128": {"rank": 128},
}


def retrain(adapter: Path) -> None:
    """Moves what make_adapter leaves as it was: DoRA's magnitudes, and whole modules."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if "lora_A" not in name and "lora_B" not in name:
            tensor *= 1 + 0.3 * torch.rand(tensor.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", DEDICATED)
def test_adapter_that_cannot_be_swapped_is_merged_and_served_dedicated_with_no_word_but_push(
    server: LoradockServer, trained: Trained, tmp_path: Path, kind: str
) -> None:
    adapter = make_adapter(tmp_path / kind, trained.base, 7, target_modules=LINEAR_MODULES, **DEDICATED[kind])
    retrain(adapter)
    pushed = server.loradock("push", str(adapter), kind)
    assert "dedicated" in pushed.stdout
    assert_same_tokens(server, kind, trained.base, adapter)
    assert server.card(kind)["state"] == "ready"
    assert "merging tensor by tensor" in server.log_path.read_text()
    assert "merging with PEFT" not in server.log_path.read_text()


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_repaired_adapters_share_the_engine_and_answer_as_peft_does(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    right = make_adapter(tmp_path / "right", trained.base, 11)
    drifted = tmp_path / "drifted"
    shutil.copytree(right, drifted)
    tensors = load_file(right / "adapter_model.safetensors")
    names = {name: "module." + name.replace("model.layers", "language_model.model.layers") for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, drifted / "adapter_model.safetensors")
    assert "tensors_renamed" in server.loradock("push", str(drifted), "drifted").stderr
    assert server.card("drifted")["placement"] == "shared"
    assert differing(server, "drifted", "base") >= 18
    assert_same_tokens(server, "drifted", trained.base, right)
    pissa, converted = make_pissa(tmp_path / "pissa", trained.base)
    assert "initial_adapter_subtracted" in server.loradock("push", str(pissa), "pissa").stderr
    assert server.card("pissa")["placement"] == "shared"
    assert differing(server, "pissa", "base") >= 10
    assert_same_tokens(server, "pissa", trained.base, converted)


def make_pissa(directory: Path, base: Path) -> tuple[Path, Path]:
    """A PiSSA adapter with its initial one beside it, and what PEFT's own conversion makes of the two."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=8, target_modules=list(LINEAR_MODULES), init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(directory / "initial_adapter"))
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1 + 0.4 * torch.randn_like(parameter))
    model.save_pretrained(str(directory))
    converted = directory.with_name("converted")
    model.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(directory / "initial_adapter"))
    return directory, converted


def test_openai_client_streams_chats_and_lists_models(server: LoradockServer, trained: Trained) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    assert {"tiny-llama", "linear", "whole-list"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("linear").id == "linear"
    stream = client.chat.completions.create(
        model="linear",
        messages=[{"role": "user", "content": "import return"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(
        model="linear", messages=[{"role": "user", "content": "import return"}], max_tokens=8, temperature=0
    )
    assert streamed == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {whole.model} == {"linear"}
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError, match="Near names: linear"):
        client.completions.create(model="linaer", prompt="x")


def test_adapter_with_its_own_chat_template_is_asked_with_it(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "templated", trained.base, 9)
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %} import")
    server.loradock("push", str(adapter), "templated")
    body = {
        "model": "templated",
        "messages": [{"role": "user", "content": "return"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
    plain = server.complete("templated", "[return] import", 8, add_special_tokens=False)
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    refused = httpx.post(f"{server.url}/v1/responses", json={"model": "templated", "input": "x"}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "chat_template_unsupported")


def test_new_version_under_traffic_answers_without_restart_and_rolls_back(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    first = make_adapter(tmp_path / "one", trained.base, 21)
    second = make_adapter(tmp_path / "two", trained.base, 22, target_modules=ALL_MODULES)
    prompt = PROMPTS[0]
    server.loradock("push", str(first), "moving")
    tokens_one = server.tokens("moving", prompt, MAX_TOKENS)
    body = {
        "model": "moving",
        "prompt": prompt,
        "max_tokens": 200,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as stream:
        lines = stream.iter_lines()
        begun = next(line for line in lines if line.startswith("data:"))
        server.loradock("push", str(second), "moving")
        tokens_two = server.tokens("moving", prompt, MAX_TOKENS)
        rest = [line for line in lines if line.startswith("data:")]
    assert rest[-1] == "data: [DONE]"
    events = [json.loads(line[5:]) for line in [begun, *rest[:-1]]]
    text = "".join(event["choices"][0]["text"] for event in events)
    alone = server.complete("moving@1", prompt, 200, ignore_eos=True)["choices"][0]["text"]
    assert text == alone, "a request in flight must finish on the version it began with"
    assert tokens_one != tokens_two
    assert server.tokens("moving@1", prompt, MAX_TOKENS) == tokens_one
    server.loradock("rollback", "moving", "1")
    assert server.tokens("moving", prompt, MAX_TOKENS) == tokens_one
    assert server.tokens("moving@2", prompt, MAX_TOKENS) == tokens_two


def test_removed_model_is_gone_and_its_engine_keeps_serving_others(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    server.loradock("push", str(make_adapter(tmp_path / "gone", trained.base, 31)), "gone")
    assert server.tokens("gone", PROMPTS[0], 4)
    server.loradock("rm", "gone")
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "gone", "prompt": "x"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert_same_tokens(server, "base", trained.base, None)


def test_prompt_logprobs_of_an_adapter_on_the_head_are_answered(server: LoradockServer) -> None:
    answer = server.complete("whole-list", PROMPTS[0], 1, prompt_logprobs=1)
    logprobs = answer["choices"][0]["prompt_logprobs"]
    assert len(logprobs) == answer["usage"]["prompt_tokens"]
    assert all(entry is None or all(value["logprob"] <= 0 for value in entry.values()) for entry in logprobs)
