"""Writing the checkpoint: complete or absent. Everything goes to a temporary folder, is synced, and is renamed into
place.

An adapter is PEFT's layout without base matrices; a full model is what transformers and vLLM load as it is.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loradock_train.encode import stop_token_ids
from loradock_train.errors import TrainError
from loradock_train.tokenizer import padding_id, save_tokenizer


def write_atomically(directory: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary neighbour; then sync and rename it to `directory`, which must not exist."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for path in sorted(temporary.rglob("*")):
            path.chmod(0o644)  # safetensors writes 0600: another user's server could not read it
            _sync(path)
        _sync(temporary)
        temporary.rename(directory)
        _sync(directory.parent)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype) -> None:
    """adapter_config.json, adapter_model.safetensors and the chat template.

    PEFT keeps A and B in float32 over a bf16 base: tensors are cast here. The tokenizer stays with the base; the
    passport names it by its hash.
    """
    tensors = {name: _cast(tensor, dtype) for name, tensor in adapter_tensors(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "adapter_config.json", adapter_settings(model))
    if isinstance(tokenizer.chat_template, str):
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter's file holds, by name.

    PEFT adds whole base matrices when the embedding or the head is a target. They are left out (and looked for: one of
    them would make 46 MB of an 8B's adapter 2.2 GB).
    """
    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    strays = [name for name in state if ".base_layer." in name and not name.endswith(".bias")]
    if strays:
        raise TrainError(f"base matrices among the adapter's tensors, which must not be: {', '.join(strays[:3])}")
    return dict(sorted(state.items()))


def adapter_settings(model: PeftModel) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    options = model.peft_config["default"]
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in options.to_dict().items()}
    values.update(inference_mode=True, base_model_name_or_path=str(options.base_model_name_or_path))
    return values


def save_full(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype) -> None:
    """Weights in `dtype`, a config.json that says so, the tokenizer, and a generation config that knows where to
    stop."""
    state = {name: _cast(tensor, dtype) for name, tensor in model.state_dict().items()}
    if model.can_generate():
        model.generation_config = _generation_config(model, tokenizer)
    model.save_pretrained(str(directory), state_dict=state)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(path, config)
    save_tokenizer(tokenizer, directory)


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base's own, with every stop token. Sampling defaults of the base are kept."""
    stops = list(stop_token_ids(tokenizer))
    known = getattr(model.generation_config, "eos_token_id", None)
    for token in known if isinstance(known, list) else [known]:
        if isinstance(token, int) and token not in stops:
            stops.append(token)
    values: dict[str, Any] = model.generation_config.to_dict() if model.generation_config is not None else {}
    values.update(eos_token_id=stops if len(stops) != 1 else stops[0], pad_token_id=padding_id(tokenizer))
    if tokenizer.bos_token_id is not None:
        values["bos_token_id"] = tokenizer.bos_token_id
    return GenerationConfig(**values)  # type: ignore[no-untyped-call]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
