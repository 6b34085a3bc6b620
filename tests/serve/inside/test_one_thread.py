"""Small operators run on one thread, large ones on all, and the number of threads is as it was afterwards."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

from loradock_serve.inside.cpu_activation import SmallGeluAndMul, SmallSiluAndMul, use_small_activations
from loradock_serve.inside.one_thread import SMALL_ELEMENTS, on_one_thread

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize(
    ("elements", "threads"), [(1, 1), (SMALL_ELEMENTS, 1), (SMALL_ELEMENTS + 1, 2)], ids=["one", "few", "many"]
)
def test_number_of_threads_follows_the_size(elements: int, threads: int) -> None:
    assert on_one_thread(elements, torch.get_num_threads) == threads
    assert torch.get_num_threads() == 2


def test_threads_are_back_after_an_error() -> None:
    def fail() -> None:
        raise ValueError("wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        on_one_thread(1, fail)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("plain", "small"), [(SiluAndMul, SmallSiluAndMul), (GeluAndMul, SmallGeluAndMul)])
@pytest.mark.parametrize("rows", [3, 2 * SMALL_ELEMENTS // 64 + 1], ids=["small", "large"])
def test_activation_in_place_of_vllms_equals_it(
    monkeypatch: pytest.MonkeyPatch, plain: type[SiluAndMul | GeluAndMul], small: type[torch.nn.Module], rows: int
) -> None:
    monkeypatch.delitem(op_registry_oot, plain.__name__, raising=False)
    with set_current_vllm_config(VllmConfig()):
        theirs = plain()
    use_small_activations()
    use_small_activations()  # every process loads plug-ins, some twice
    with set_current_vllm_config(VllmConfig()):
        ours = plain()
    x = torch.randn(rows, 128)

    assert type(ours) is small
    assert type(theirs) is plain
    assert torch.equal(ours.forward_cpu(x), theirs.forward_native(x))
