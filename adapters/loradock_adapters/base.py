"""What the gate needs to know of the served base model: which modules it has, and their shapes.

From the headers of its weights where they are local (exact, any architecture), else derived from config.json for the
llama-like families and GPT-2. Loads no weights, and does not know what an engine makes of the architecture
(engine_rules.py).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loradock_adapters.base_shapes import derived_modules, text_config
from loradock_adapters.checkpoint import MAX_CONFIG_BYTES, MODEL_CONFIG, resolve_checkpoint_dir
from loradock_adapters.errors import BaseModelError, HeaderError, NotFoundError
from loradock_adapters.safetensors_header import read_header

EMBEDDING_NAMES = frozenset(
    {"embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "embed_in", "embed_out", "embedding"}
)
"""Last parts of the names that modules over the vocabulary or over positions go by."""
_LAYER = re.compile(
    r"(?:model|model\.language_model|model\.text_model|language_model\.model|transformer)\.(?:layers|h)\.(\d{1,9})\."
)
"""Where the families keep the layers of their language models."""


@dataclass(frozen=True)
class BaseModel:
    """The served base, as far as an adapter can touch it."""

    config: Mapping[str, Any]
    architectures: tuple[str, ...]
    modules: Mapping[str, tuple[int, int]]
    """Module name -> (out_features, in_features); an embedding is (vocabulary, hidden)."""
    hidden_size: int | None
    vocab_size: int | None
    exact: bool
    """True where `modules` comes from the weights themselves: then a module that is not listed does not exist."""
    tied: bool
    """The output matrix is the input embedding."""
    model_id: str | None = None
    """What it is served as: a hub id or a path; only for messages."""
    tensor_names: frozenset[str] = frozenset()
    """Every tensor of the weights, norms and biases too; empty where the weights are not local."""
    weights_sha256: str | None = None
    """passport.weights_sha256() of the base, where somebody has computed it."""
    directory: Path | None = None
    """Where its files are; None of a parsed config."""

    @property
    def known(self) -> bool:
        """Whether adapters can be compared with it at all."""
        return bool(self.modules)

    @property
    def multimodal(self) -> bool:
        return any(key in self.config for key in ("vision_config", "audio_config"))

    def has(self, module: str) -> bool:
        """Whether there is such a module, with or without a matrix (a norm, say)."""
        if module in self.modules or f"{module}.weight" in self.tensor_names:
            return True
        return not self.exact and "norm" in module.rpartition(".")[2]

    @property
    def layers(self) -> int:
        """Layers of its language model; 0 where the config does not say."""
        return _count(text_config(self.config), "num_hidden_layers", "n_layer") or 0

    def is_beyond_layers(self, module: str) -> bool:
        """Whether a module is of a layer that the language model does not have.

        Also where the weights hold one: what lies past the last layer (a head for speculative decoding) is not part of
        the model that answers.
        """
        found = _LAYER.match(module)
        return found is not None and self.layers > 0 and int(found[1]) >= self.layers

    @property
    def embedding_modules(self) -> frozenset[str]:
        return frozenset(name for name in self.modules if is_embedding(name))

    def to_json(self) -> dict[str, Any]:
        """What a client needs to have an adapter judged for this base without having it."""
        return {
            "model_id": self.model_id,
            "config": dict(self.config),
            "modules": {module: list(shape) for module, shape in self.modules.items()},
            "tensor_names": sorted(self.tensor_names),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], weights: str | None = None) -> "BaseModel":
        """From a server's answer; `weights` goes where the weights' hash does. Raises ValueError for what is none."""
        config, modules, names = (document.get(key) for key in ("config", "modules", "tensor_names"))
        if not isinstance(config, dict) or not isinstance(modules, dict) or not isinstance(names, list):
            raise ValueError("the answer describes no base")
        model_id = document.get("model_id")
        derived = base_from(config, model_id=model_id if isinstance(model_id, str) else None, weights_sha256=weights)
        shapes = {str(module): (int(shape[0]), int(shape[1])) for module, shape in modules.items()}
        return replace(derived, modules=shapes, exact=bool(names), tensor_names=frozenset(map(str, names)))


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in EMBEDDING_NAMES


def base_from(
    source: Path | str | Mapping[str, Any], *, model_id: str | None = None, weights_sha256: str | None = None
) -> BaseModel:
    """The base model in a directory (config.json, with or without weights), or of a parsed config.

    Raises NotFoundError, BaseModelError. An unknown architecture without local weights is no error: `known` is False.
    """
    directory: Path | None = None
    if isinstance(source, Mapping):
        config, shapes = source, {}
    else:
        directory = resolve_checkpoint_dir(Path(source))
        config = _read_config(directory / MODEL_CONFIG)
        shapes = _weight_shapes(directory)
        model_id = model_id if model_id is not None else str(source)
    text = text_config(config)
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))
    derived = derived_modules(config)
    modules = _modules_of(shapes, derived, tied, bool(config.get("quantization_config"))) if shapes else derived
    return BaseModel(
        config=config,
        architectures=_architectures(config),
        modules=modules,
        hidden_size=_count(text, "hidden_size", "n_embd", "d_model"),
        vocab_size=_count(text, "vocab_size"),
        exact=bool(shapes),
        tied=tied,
        model_id=model_id,
        tensor_names=frozenset(shapes),
        weights_sha256=weights_sha256,
        directory=directory,
    )


def find_base(text: str) -> Path:
    """A base by its directory, or by its hub id where the local Hugging Face cache holds it. Raises NotFoundError."""
    directory = Path(text)
    if directory.is_dir():
        return directory
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{text.replace('/', '--')}"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and (cache / "refs" / "main").is_file():
        snapshot = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
        if snapshot.is_dir():
            return snapshot
    raise NotFoundError(
        f"there is no base model at {ascii(text)[:120]}, neither a directory nor in the local hub cache"
    )


def _modules_of(
    shapes: Mapping[str, tuple[int, ...]], derived: Mapping[str, tuple[int, int]], tied: bool, packed: bool
) -> dict[str, tuple[int, int]]:
    """Modules with a matrix, by the weights' own names. A tied output matrix is not in the file, but is a module."""
    modules: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and len(shape) == 2:
            modules[module] = (shape[0], shape[1])
    if derived and (packed or not derived.keys() & modules.keys()):
        # Quantised weights are packed under other names and shapes; or the file's names lack the prefix that the
        # model's own modules have (GPT-2 on the hub: `h.0.attn.c_attn`).
        return dict(derived)
    if any(module in modules and modules[module] != shape for module, shape in derived.items()):
        # Conv1D keeps its matrix transposed; the derived shapes are (out, in) as everywhere else.
        modules.update(
            {module: shape for module, shape in derived.items() if module in modules and modules[module] == shape[::-1]}
        )
    if tied and "lm_head" not in modules:
        embedding = next(
            (shape for name, shape in modules.items() if name.rpartition(".")[2] in ("embed_tokens", "wte")), None
        )
        if embedding is not None:
            modules["lm_head"] = embedding
    return modules


def _weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            shapes.update({name: info.shape for name, info in read_header(path).items()})
        except HeaderError as error:
            raise BaseModelError(f"the base model's weights cannot be read: {error}") from error
    return shapes


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BaseModelError(f"{path} is over the limit of {MAX_CONFIG_BYTES} bytes")
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist: a base model is a directory with a config.json") from None
    except (ValueError, RecursionError):
        raise BaseModelError(f"{path} is not valid JSON") from None
    if not isinstance(document, dict):
        raise BaseModelError(f"{path} is not a JSON object")
    return document


def _architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("architectures")
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _count(config: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return None
