"""Our loss is the model's own, in value and in gradient: for a plain head, a tied one, and heads with adapters."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from loradock_train.encode import IGNORED
from loradock_train.loss import can_own_loss, cross_entropy_sum, own_loss

VOCABULARY = 97


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loradock_train.loss.CHUNK_LOGITS", 1)  # the least a chunk can be: 64 tokens
    torch.manual_seed(0)


def llama(**options: Any) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        **options,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def batch(rows: int = 4, tokens: int = 48) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, tokens))
    labels = ids.clone()
    labels[:, :5] = IGNORED
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    labels[0, 30:] = IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loss_and_gradients(
    model: Any, inner: nn.Module, ours: bool, items: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    inputs = batch()
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    model.zero_grad()
    if ours:
        with own_loss(inner):
            loss = model(**inputs, **extra).loss
    else:
        loss = model(**inputs, **extra).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def assert_same(model: Any, inner: nn.Module, items: int | None = None) -> None:
    stock_loss, stock = loss_and_gradients(model, inner, ours=False, items=items)
    own, grads = loss_and_gradients(model, inner, ours=True, items=items)
    assert own == pytest.approx(stock_loss, rel=1e-5)
    assert grads.keys() == stock.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, stock[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any(float(grad.abs().max()) > 1e-4 for grad in grads.values())


@pytest.mark.parametrize("items", [None, 300])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_the_models_own(tied: bool, items: int | None) -> None:
    model = llama(tie_word_embeddings=tied)
    assert_same(model, model, items)


def test_loss_and_gradients_equal_the_models_own_with_adapters_on_embedding_and_head() -> None:
    model = llama()
    options = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"], init_lora_weights=False)
    adapted: Any = get_peft_model(model, options)
    assert_same(adapted, adapted.get_base_model())


WHOLE_LIST = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


def test_gradients_of_a_and_b_on_embedding_and_head_are_the_models_own() -> None:
    """The published list of modules, by name: TRL's fused loss cannot have the head among them."""
    options = LoraConfig(r=4, lora_alpha=8, target_modules=WHOLE_LIST, init_lora_weights=False)
    adapted: Any = get_peft_model(llama(), options)
    inner = adapted.get_base_model()
    assert can_own_loss(inner, batch()["input_ids"][1])
    _, stock = loss_and_gradients(adapted, inner, ours=False, items=None)
    _, own = loss_and_gradients(adapted, inner, ours=True, items=None)
    for part in (
        "lm_head.lora_A.default.weight", "lm_head.lora_B.default.weight",
        "embed_tokens.lora_embedding_A.default", "embed_tokens.lora_embedding_B.default",
    ):  # fmt: skip
        name = next(name for name in own if name.endswith(part))
        assert float(own[name].abs().max()) > 1e-3
        torch.testing.assert_close(own[name], stock[name], rtol=1e-4, atol=1e-6)
    assert not [name for name in own if ".base_layer." in name], "the base's matrices stay as they are"


class _FixedDropout(nn.Module):
    """Drops the same features of every token, so that two ways of calling the head can be compared."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(states.shape[-1], device=states.device) % 4 != 0
        return states * kept / 0.75


def test_loss_and_gradients_equal_the_models_own_with_dropout_before_the_heads_adapter() -> None:
    options = LoraConfig(r=4, lora_dropout=0.25, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted: Any = get_peft_model(llama(), options)
    without, _ = loss_and_gradients(adapted.eval(), adapted.get_base_model(), ours=True, items=None)
    adapted.train()
    for module in adapted.modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict):
            module.lora_dropout["default"] = _FixedDropout()
    assert_same(adapted, adapted.get_base_model())
    with_dropout, _ = loss_and_gradients(adapted, adapted.get_base_model(), ours=True, items=None)
    assert abs(with_dropout - without) > 1e-3, "it reaches the loss"


def test_dropout_before_the_heads_adapter_is_drawn_from_the_seed() -> None:
    options = LoraConfig(r=4, lora_dropout=0.5, target_modules=["lm_head"], init_lora_weights=False)
    adapted: Any = get_peft_model(llama(), options)
    inputs = batch()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        with own_loss(adapted.get_base_model()):
            return float(adapted(**inputs).loss.detach())

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    mean = sum(loss(seed) for seed in range(40)) / 40
    torch.manual_seed(0)
    stock = sum(float(adapted(**inputs).loss.detach()) for _ in range(40)) / 40
    assert mean == pytest.approx(stock, rel=0.02), "of the same distribution as the model's own"


def test_loss_and_gradients_equal_the_models_own_with_a_frozen_head() -> None:
    adapted: Any = get_peft_model(llama(), LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    assert_same(adapted, adapted.get_base_model())


def test_loss_under_bf16_autocast_is_close_to_float32() -> None:
    model = llama()
    inputs = batch()
    with own_loss(model):
        exact = float(model(**inputs).loss.detach())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(**inputs).loss
    mixed.backward()
    assert float(mixed.detach()) == pytest.approx(exact, rel=2e-2)
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_gpt2_is_trained_with_our_loss_too() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    model: Any = GPT2LMHeadModel(config)  # type: ignore[no-untyped-call]
    model.eval()  # its dropout would make two passes differ
    assert can_own_loss(model, batch()["input_ids"][1])
    assert_same(model, model)


def test_forward_is_the_models_own_again_afterwards() -> None:
    model = llama()
    with own_loss(model):
        assert model(**batch()).logits is None
    assert model(**batch()).logits.shape == (4, 48, VOCABULARY)


def test_without_gradient_the_loss_is_the_same() -> None:
    head = nn.Linear(8, VOCABULARY, bias=False)
    hidden, targets = torch.randn(200, 8), torch.randint(0, VOCABULARY, (200,))
    with torch.no_grad():
        plain = cross_entropy_sum(hidden, targets, head)
    taught = cross_entropy_sum(hidden.requires_grad_(), targets, head)
    torch.testing.assert_close(plain, taught.detach())


def test_batch_without_a_label_gives_zero_and_no_gradient() -> None:
    head = nn.Linear(8, VOCABULARY, bias=False)
    hidden = torch.randn(0, 8, requires_grad=True)
    total = cross_entropy_sum(hidden, torch.zeros(0, dtype=torch.long), head)
    total.backward()  # type: ignore[no-untyped-call]
    assert float(total.detach()) == 0.0
    assert head.weight.grad is not None
    assert float(head.weight.grad.abs().max()) == 0.0


def test_model_with_capped_logits_keeps_its_own_loss() -> None:
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0, initializer_range=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)  # type: ignore[no-untyped-call]
    row = batch()["input_ids"][1]
    assert not can_own_loss(model, row)
    assert can_own_loss(llama(), row)


def test_model_whose_loss_balances_its_experts_keeps_it() -> None:
    """The balance is a thousandth of the loss: a comparison of the two losses alone would not see it go."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config)  # type: ignore[no-untyped-call]
    row = batch()["input_ids"][1]
    assert not can_own_loss(model, row)
    model.config.output_router_logits = False
    assert can_own_loss(model, row)
