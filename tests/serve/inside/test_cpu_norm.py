"""The compiled norm equals vLLM's own, where it is used and where it is not."""

import pytest
import torch
import vllm._custom_ops  # noqa: F401  (registers the compiled operators)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.layernorm import RMSNorm

from loradock_serve.inside.cpu_norm import CompiledRMSNorm, use_compiled_norm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.004}


def norm(width: int, dtype: torch.dtype) -> CompiledRMSNorm:
    with set_current_vllm_config(VllmConfig()):
        made = CompiledRMSNorm(width, eps=1e-5, dtype=dtype)
    made.weight.data.normal_(1.0, 0.3)
    return made


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [256, 48, 20], ids=["vectors", "few vectors", "not whole vectors"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "with residual"])
def test_norm_equals_vllms_own(width: int, dtype: torch.dtype, with_residual: bool) -> None:
    ours = norm(width, dtype)
    x, residual = torch.randn(7, width).to(dtype), torch.randn(7, width).to(dtype)
    pair = (x.clone(), residual.clone()) if with_residual else (x.clone(),)

    expected = ours.forward_native(x, residual if with_residual else None)
    got = ours.forward_cpu(*pair)

    for one, other in zip(
        got if isinstance(got, tuple) else (got,), expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        assert float((one.float() - other.float()).abs().max()) < TOLERANCE[dtype] * float(other.float().abs().max())


def test_norm_of_a_strided_tensor_equals_vllms_own() -> None:
    ours, x = norm(32, torch.float32), torch.randn(32, 5).t()

    assert torch.equal(ours.forward_cpu(x), ours.forward_native(x))  # type: ignore[arg-type]


def test_norm_in_place_of_vllms_is_what_models_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(op_registry_oot, "RMSNorm", raising=False)
    use_compiled_norm()
    use_compiled_norm()  # every process loads plug-ins, some twice

    with set_current_vllm_config(VllmConfig()):
        made = RMSNorm(32)

    assert type(made) is CompiledRMSNorm
