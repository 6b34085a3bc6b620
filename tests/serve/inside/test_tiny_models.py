"""The tiny models are a fit reference: distinct, without near ties everywhere, and small on disk."""

from itertools import combinations
from pathlib import Path

import pytest
from safetensors import safe_open

from loradock_testing.tiny_models import ALL_MODULES, Answer, make_adapter, make_llama, reference

PROMPTS = [f"def f{i}(a, b={i * 7}):" for i in range(20)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tiny") / "base")


def test_adapter_of_the_whole_list_holds_no_base_matrices(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, base, seed=1, rank=4, target_modules=ALL_MODULES)

    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    assert all(4 in shape for shape in shapes.values())
    assert {"embed_tokens", "lm_head"} <= {part for name in shapes for part in name.split(".")}


def test_models_with_different_seeds_answer_differently(base: Path, tmp_path: Path) -> None:
    adapters = [make_adapter(tmp_path / str(seed), base, seed) for seed in (1, 2)]

    answers = [reference(base, adapter, PROMPTS, 8) for adapter in (None, *adapters)]

    for one, other in combinations(answers, 2):
        assert sum(a.tokens != b.tokens for a, b in zip(one, other, strict=True)) >= 0.9 * len(PROMPTS)


def test_reference_in_a_batch_equals_reference_alone(base: Path) -> None:
    together = reference(base, None, PROMPTS, 8)

    alone = [reference(base, None, [prompt], 8)[0] for prompt in PROMPTS]

    assert not any(a.is_contradicted_by(b.tokens) for a, b in zip(together, alone, strict=True))


def test_answer_is_contradicted_only_beyond_a_near_tie() -> None:
    answer = Answer(tokens=(1, 2, 3), gaps=(0.5, 1e-4, 0.5), text="")

    assert not answer.is_contradicted_by((1, 2, 3))
    assert not answer.is_contradicted_by((1, 9, 9))
    assert answer.is_contradicted_by((1, 2, 9))
    assert answer.is_contradicted_by((1, 2))
