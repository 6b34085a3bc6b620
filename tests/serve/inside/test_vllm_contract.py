"""What our code inside vLLM relies on, checked against the installed vLLM without starting an engine.

When vLLM moves, these fail first and by name. Each private touch that a module of `loradock_serve.inside` names at its
head has a test here.
"""

import inspect
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from safetensors.torch import save_file
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper import punica_selector
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperABC
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.import_utils import resolve_obj_by_qualname

from loradock_serve.inside import plugin
from loradock_serve.inside.cpu_lora import CorrectedPunicaWrapperCPU


def test_vllm_is_the_version_this_was_read_from() -> None:
    assert vllm.__version__.split("+")[0] == "0.32.0"


def test_cpu_platform_names_the_stock_wrapper() -> None:
    assert f'"{plugin.STOCK_WRAPPER}"' in inspect.getsource(inspect.getmodule(CpuPlatform))  # type: ignore[arg-type]
    assert "current_platform.get_punica_wrapper()" in inspect.getsource(punica_selector)


def test_names_of_the_wrappers_resolve() -> None:
    assert resolve_obj_by_qualname(plugin.STOCK_WRAPPER) is PunicaWrapperCPU
    assert resolve_obj_by_qualname(plugin.CORRECTED_WRAPPER) is CorrectedPunicaWrapperCPU


def test_entry_points_name_our_plugins() -> None:
    (general,) = entry_points(group="vllm.general_plugins", name="loradock")
    (endpoint,) = entry_points(group="vllm.endpoint_plugins", name="loradock_endpoints")

    assert general.load() is plugin.register
    assert endpoint.load().name == "loradock_endpoints"


REGISTER_TWICE = """
from vllm.platforms import current_platform
from loradock_serve.inside.plugin import register
import sys
register(); register()
print(current_platform.get_punica_wrapper())
print("vllm.lora.model_manager" in sys.modules, "vllm.lora.layers" in sys.modules)
"""


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM runs on another platform here")
def test_register_twice_installs_the_wrapper_and_imports_no_lora_code() -> None:
    done = subprocess.run([sys.executable, "-c", REGISTER_TWICE], capture_output=True, text=True, check=True)

    assert done.stdout.split() == [plugin.CORRECTED_WRAPPER, "False", "False"]


class FakePlatform:
    """A platform that is not the CPU one, or names a wrapper of its own."""

    wrapper = "elsewhere.Wrapper"
    cpu = False

    def is_cpu(self) -> bool:
        return self.cpu

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return cls.wrapper


@pytest.mark.parametrize(("cpu", "wrapper"), [(False, plugin.STOCK_WRAPPER), (True, "elsewhere.Wrapper")])
def test_register_elsewhere_changes_nothing(cpu: bool, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type("Platform", (FakePlatform,), {"cpu": cpu, "wrapper": wrapper})()
    monkeypatch.setattr("vllm.platforms.current_platform", platform, raising=False)

    plugin.register()

    assert platform.get_punica_wrapper() == wrapper


@pytest.mark.parametrize("method", [name for name in vars(PunicaWrapperABC) if not name.startswith("_")])
def test_wrapper_takes_the_arguments_that_layers_pass(method: str) -> None:
    stock = inspect.signature(getattr(PunicaWrapperCPU, method)).parameters
    ours = inspect.signature(getattr(CorrectedPunicaWrapperCPU, method)).parameters

    assert [name for name in ours if name in stock] == list(stock)
    assert all(
        parameter.default is not inspect.Parameter.empty or parameter.kind is inspect.Parameter.VAR_KEYWORD
        for name, parameter in ours.items()
        if name not in stock
    )


def test_every_abstract_method_that_stock_implements_is_ours() -> None:
    """apply_lora_full_linear masks rows without an adapter itself, and is kept."""
    implemented = {name for name in vars(PunicaWrapperCPU) if name in vars(PunicaWrapperABC)}

    assert implemented - set(vars(CorrectedPunicaWrapperCPU)) == {"apply_lora_full_linear"}
    assert "use_full" in inspect.getsource(PunicaWrapperCPU._select_full_linear_output)


def test_activation_goes_through_the_hooked_method() -> None:
    source = inspect.getsource(LRUCacheLoRAModelManager.activate_adapter)

    assert "super().activate_adapter(lora_id)" in source
    assert list(inspect.signature(LoRAModelManager.activate_adapter).parameters)[1:] == ["lora_id"]
    manager = inspect.getsource(LoRAModelManager)
    assert manager.count(".set_lora(") == 1  # nobody writes a slot but activate_adapter


def test_model_runner_slices_prompt_states_and_copies_sampled_ones() -> None:
    """How the wrapper tells prompt rows from sampled rows: by whether they are a view of the hidden states."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "hidden_states[offset : offset + num_logits]" in inspect.getsource(GPUModelRunner._get_prompt_logprobs_dict)
    assert "hidden_states[logits_indices]" in inspect.getsource(GPUModelRunner.execute_model)


def test_embedding_layer_reads_the_offsets_that_we_fill() -> None:
    from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA

    assert "self.punica_wrapper._embeddings_indices[:num_tokens]" in inspect.getsource(VocabParallelEmbeddingWithLoRA)


def test_endpoints_are_an_endpoint_plugin_and_know_their_engine() -> None:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
    from vllm.v1.engine.async_llm import AsyncLLM

    from loradock_serve.inside.endpoints import LoradockEndpoints

    assert isinstance(LoradockEndpoints(), EndpointPlugin)
    assert {"add_lora", "remove_lora", "collective_rpc", "errored"} <= set(dir(AsyncLLM))
    assert {"unload_lora_adapter", "is_base_model"} <= set(dir(OpenAIServingModels))
    assert list(inspect.signature(AsyncLLM.collective_rpc).parameters)[1:] == ["method", "timeout", "args", "kwargs"]
    registry = inspect.getsource(OpenAIServingModels)
    assert "self.lora_requests: dict[str, LoRARequest] = {}" in registry
    assert "self.lora_id_counter.inc(1)" in registry  # how vLLM's own load numbers an adapter, and
    assert "self.lora_requests[lora_name] = lora_request" in registry  # all that it does besides loading it


def test_step_reads_an_adapter_by_the_method_that_staging_replaces() -> None:
    source = inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)

    assert "lora = self._load_adapter(lora_request)" in source
    assert "_load_adapter" not in vars(LRUCacheWorkerLoRAManager)
    assert list(inspect.signature(WorkerLoRAManager._load_adapter).parameters)[1:] == ["lora_request"]
    assert "self._create_merged_loras_inplace(lora)" in inspect.getsource(LoRAModelManager._add_adapter)
    assert "_is_moe" in inspect.getsource(LoRAModelManager.__init__)


def test_merging_twice_is_merging_once() -> None:
    """A reader's thread merges what the step will merge again."""
    layers = {
        f"model.layers.0.self_attn.{name}": LoRALayerWeights(name, 4, 8, torch.ones(4, 8), torch.ones(8, 4), 2.0)
        for name in ("q_proj", "v_proj", "o_proj")
    }
    model = LoRAModel(1, 4, layers)
    manager: Any = LoRAModelManager.__new__(LoRAModelManager)
    packed = "model.layers.0.self_attn.qkv_proj"
    manager.packed_modules = {packed: [packed.replace("qkv", part) for part in "qkv"]}
    manager.modules, manager.is_pooling_model = {}, False

    manager._create_merged_loras_inplace(model)
    first = {name: (layer, layer.lora_b) for name, layer in model.loras.items()}
    manager._create_merged_loras_inplace(model)

    assert {name: (layer, layer.lora_b) for name, layer in model.loras.items()} == first
    q, k, v = model.loras[packed].lora_b
    assert (q[0, 0], k, v[0, 0]) == (2, None, 2)
    assert model.loras["model.layers.0.self_attn.o_proj"].lora_b[0, 0] == 2


def test_layers_have_the_stacks_that_shapes_are_checked_against() -> None:
    for layer, a_place in (
        (BaseLinearLayerWithLoRA, "self.lora_a_stacked[0][index, 0, : lora_a.shape[0], : lora_a.shape[1]]"),
        (LogitsProcessorWithLoRA, "self.lora_a_stacked[index, 0, : lora_a.shape[0], : lora_a.shape[1]]"),
        (VocabParallelEmbeddingWithLoRA, "self.lora_a_stacked[index, : lora_a.shape[1], : lora_a.shape[0]]"),
    ):
        assert a_place in inspect.getsource(layer)
    assert "self.tp_size" in inspect.getsource(BaseLinearLayerWithLoRA)


def test_layers_that_are_written_our_way_do_no_more_in_their_own() -> None:
    """`slot_copy.py` stands in for these two: zero the slot, take this worker's share, copy."""
    single = inspect.getsource(BaseLinearLayerWithLoRA.set_lora)
    merged = inspect.getsource(MergedColumnParallelLinearWithLoRA.set_lora)

    for source in (single, merged):
        assert source.count("self.reset_lora(index)") == 1
        assert source.count(".copy_(") == 2
        assert source.count("if self.tp_size > 1:") == 1
    assert "len(lora_b) != self.n_slices" in merged
    assert MergedQKVParallelLinearWithLoRA.set_lora is MergedColumnParallelLinearWithLoRA.set_lora
    assert RowParallelLinearWithLoRA.set_lora is BaseLinearLayerWithLoRA.set_lora


def test_reading_a_safetensors_file_of_the_right_format_maps_it(tmp_path: Path) -> None:
    """What keeps a packed adapter from taking memory of its own, and a reader's thread from copying."""
    path = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    save_file({name: torch.ones(64, 1024)}, path)
    (tmp_path / "adapter_config.json").write_text('{"r": 64, "lora_alpha": 64, "target_modules": ["o_proj"]}')

    model = LoRAModel.from_local_checkpoint(
        str(tmp_path),
        {"o_proj"},
        PEFTHelper.from_local_dir(str(tmp_path), None),
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
    )

    (layer,) = model.loras.values()
    with Path("/proc/self/maps").open() as maps:
        spans = [line.split(" ")[0].split("-") for line in maps if str(path) in line]
    assert any(int(begin, 16) <= layer.lora_a.data_ptr() < int(end, 16) for begin, end in spans)


def test_counts_and_pins_hang_on_what_they_name() -> None:
    """What these do is tried in test_adapter_counts.py and test_slot_pins.py, on the real managers."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.utils.cache import LRUCache

    pin = inspect.getsource(LRUCacheLoRAModelManager._pin_lora_in_gpu_cache)
    assert "self.activate_adapter(lora_id)" in pin
    assert "self._apply_adapters(" in inspect.getsource(LRUCacheWorkerLoRAManager.set_active_adapters)
    assert "self._adapter_manager.activate_adapter(" in inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    assert "self._add_adapter(lora)" in inspect.getsource(LRUCacheLoRAModelManager.add_adapter)
    assert "self.popitem(remove_pinned=remove_pinned)" in inspect.getsource(LRUCache.remove_oldest)
    assert "self._adapter_manager.remove_adapter(" in inspect.getsource(LRUCacheWorkerLoRAManager.remove_adapter)


def test_model_runners_of_both_generations_go_through_the_manager_that_we_watch() -> None:
    """GPUs with Triton get the second one, unless a feature is asked for that it lacks; CPUs get the first."""
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    folder = Path(mixin.__file__).parent
    assert "LoRAModelRunnerMixin" in (folder / "gpu_model_runner.py").read_text(encoding="utf-8")
    second = (folder / "gpu" / "model_runner.py").read_text(encoding="utf-8")
    assert "class GPUModelRunner(LoRAModelRunnerMixin):" in second
    assert "self._set_active_loras(*lora_inputs)" in second
    steps = inspect.getsource(mixin.LoRAModelRunnerMixin._set_active_loras)
    assert "self.lora_manager.set_active_adapters(lora_requests, lora_mapping)" in steps
    assert "self.lora_manager = LRUCacheWorkerLoRAManager(" in inspect.getsource(mixin)


def test_worker_extension_hides_nothing_of_the_worker() -> None:
    """vLLM refuses an extension whose attributes its worker has."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    from loradock_serve.inside.worker import LoradockWorker

    ours = {name for name in dir(LoradockWorker) if not name.startswith("__")}
    assert not ours & set(dir(CPUWorker))


def test_engine_generates_from_token_ids_and_tells_log_probabilities() -> None:
    """`probe.py`: the call, and the names of what it sets and reads."""
    from vllm import SamplingParams
    from vllm.config.model import ModelConfig
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.sample.sampler import Sampler

    parameters = inspect.signature(AsyncLLM.generate).parameters
    assert list(parameters)[1:4] == ["prompt", "sampling_params", "request_id"]
    assert "lora_request" in parameters
    assert {"logprobs", "skip_reading_prefix_cache", "detokenize", "output_kind"} <= set(SamplingParams.__annotations__)
    assert {"max_logprobs", "logprobs_mode", "quantization"} <= set(ModelConfig.__annotations__)
    assert "logprobs" in CompletionOutput.__annotations__
    assert "logprob" in Logprob.__annotations__
    # Why chosen tokens are not asked for: one request's are everybody's.
    assert "logprobs_tensors = logprob_token_ids_tensors" in inspect.getsource(Sampler.forward)
