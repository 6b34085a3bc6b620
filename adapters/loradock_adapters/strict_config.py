"""Config files that are checked whole: every problem at once, each naming its key, a typo with the nearest known key.

For the frozen pydantic models of `loradock serve` and `loradock train`. Knows no field of either.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from loradock_adapters.errors import UsageError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. UsageError names the file and the line where it is broken or says a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise UsageError(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected keys and values, found a {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def parse_value(text: str) -> Any:
    """One YAML value, by the rules of the files: what stands behind `--set key=`. ValueError if it is not YAML."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not a YAML value") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's own rule, which PyYAML does not keep: a key may stand once in a mapping. And 1e-4 is a number.

    A key that stands twice with one value does no harm, and files in the wild have them.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen and not _same(seen[key], value_node):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen[key] = value_node
        return super().construct_mapping(node, deep=deep)


def _same(one: yaml.Node, other: yaml.Node) -> bool:
    """Whether two plain values are written alike."""
    scalars = isinstance(one, yaml.ScalarNode) and isinstance(other, yaml.ScalarNode)
    return scalars and (one.tag, one.value) == (other.tag, other.value)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).replace("_", ""))


# PyYAML follows YAML 1.1, where `1e-4` (no dot) is a string; every training config in the world writes it.
_UniqueKeyLoader.add_constructor("!loradock-exponent", _number)
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_UniqueKeyLoader.add_implicit_resolver("!loradock-exponent", _EXPONENT, list("-+0123456789"))


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each thing wrong, `key.inner: what` in the order of the file."""
    return [f"{_key(problem['loc'])}: {_what(problem, model)}" for problem in error.errors()]


def _key(location: Iterable[int | str]) -> str:
    return ".".join(str(part) for part in location) or "the file"


def _what(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    kind, location = problem["type"], problem["loc"]
    if kind == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), owner.model_fields if owner else (), n=1)
        return f"unknown key; did you mean `{near[0]}`?" if near else "unknown key"
    if kind == "missing":
        return "missing, and needed"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = isinstance(given, str | int | float | bool) and not _is_secret(location, model)
    return f"{message} (given: {given!r})" if shown else message


def _is_secret(location: Sequence[int | str], model: type[BaseModel]) -> bool:
    """Whether what stands there must not be repeated."""
    for end in range(len(location), 0, -1):  # pydantic may name parts of a union behind the key
        owner = _model_at(model, location[: end - 1])
        field = owner.model_fields.get(str(location[end - 1])) if owner is not None else None
        if field is not None:
            return SecretStr in (field.annotation, *get_args(field.annotation))
    return False


def _model_at(model: type[BaseModel], location: Iterable[int | str]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            return None
        field = current.model_fields.get(str(part))
        current = _nested(field.annotation) if field else None
    return current


def _nested(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
