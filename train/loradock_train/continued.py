"""Going on from an adapter: its base is checked, and its weights are where the training begins.

What is trained is that adapter, so rank, targets and scale cannot change: continued_options.py refuses a config that
says otherwise.
"""

import warnings
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from loradock_adapters.errors import CheckpointError
from loradock_adapters.passport import read_passport, weights_sha256
from loradock_train.config_sections import LoraOptions
from loradock_train.errors import ModelError
from loradock_train.model import base_directory


def check_adapter_base(directory: Path, model_id: str) -> list[str]:
    """Notices. Raises ModelError where the adapter's passport names another base, by the hash of its weights."""
    try:
        passport = read_passport(directory)
    except CheckpointError as error:
        raise ModelError(f"adapter_path: its passport cannot be read: {error}") from error
    theirs = passport.base.weights_sha256 if passport is not None else None
    place = base_directory(model_id)
    if passport is None or theirs is None or place is None:
        return [
            f"adapter_path: nothing says which base {directory} was trained on: that it is {model_id} is not checked"
        ]
    ours = weights_sha256(place)
    if ours != theirs:
        raise ModelError(
            f"adapter_path: it was trained on {passport.base.model_id} (weights {theirs[:12]}…), not on model_id "
            f"{model_id} (weights {str(ours)[:12]}…); give that base as model_id"
        )
    return []


def load_adapter(model: PreTrainedModel, directory: Path, options: LoraOptions) -> PeftModel:
    """The model with the adapter, ready to be trained further. Raises ModelError."""
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(directory)))
    config.lora_dropout, config.inference_mode = options.lora_dropout, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT only warns of weights that are missing
            return PeftModel.from_pretrained(model, str(directory), is_trainable=True, config=config)
    except (UserWarning, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"adapter_path: {directory} does not fit this base: {first}") from error
