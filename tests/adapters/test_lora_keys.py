"""Names of an adapter's tensors, and the patterns that its config names modules by."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_adapters.lora_keys import RankPatterns, is_safe_pattern, parse_key
from loradock_testing.checkpoints import PREFIX
from loradock_testing.verdicts import Q0


@pytest.mark.parametrize(
    ("tensor", "module", "part"),
    [
        (f"{PREFIX}{Q0}.lora_A.weight", Q0, "A"),
        (f"{Q0}.lora_B.weight", Q0, "B"),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", "model.embed_tokens", "embedding_A"),
        (f"{PREFIX}lm_head.base_layer.weight", "lm_head", "base_layer"),
        (f"{PREFIX}lm_head.weight", "lm_head", "full"),
        (f"{PREFIX}{Q0}.lora_A.default.weight", f"{Q0}.lora_A.default.weight", "unknown"),
    ],
)
def test_parse_key_taken_apart(tensor: str, module: str, part: str) -> None:
    key = parse_key(tensor)
    assert (key.module, key.part) == (module, part)


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.0\..*q_proj", "^model.layers.[0-9]+.mlp", "(q|v)_proj"])
def test_is_safe_pattern_usual_ones_are(pattern: str) -> None:
    assert is_safe_pattern(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a|a)*b", "a*b*c*d*", "(", "[a", "x" * 257, "a{1,999}", "(?P<x>a)(?P=x)"]
)
def test_is_safe_pattern_hanging_or_broken_ones_are_not(pattern: str) -> None:
    assert not is_safe_pattern(pattern)


def test_rank_of_matches_at_name_boundaries_like_peft() -> None:
    ranks = RankPatterns(8, {"self_attn.q_proj": 32, "layers.1.mlp.up_proj": 2})
    assert ranks.rank_of("model.layers.0.self_attn.q_proj") == 32
    assert ranks.rank_of("model.layers.11.mlp.up_proj") == 8
    assert ranks.rank_of("model.layers.1.mlp.up_proj") == 2
    assert ranks.largest == 32


MODULES = [f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]


@given(
    st.dictionaries(
        st.sampled_from(
            [*MODULES, "q_proj", "up_proj", "layers.1.mlp.up_proj", "mlp.*", "(q|up)_proj", "^lm_head", "1"]
        ),
        st.integers(1, 64),
    )
)
def test_rank_of_any_patterns_same_as_pefts_own_search(patterns: dict[str, int]) -> None:
    ranks = RankPatterns(8, patterns)
    for module in MODULES:
        first = next((rank for key, rank in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), 8)
        assert ranks.rank_of(module) == first
