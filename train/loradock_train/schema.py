"""The JSON Schema of a training config, for editors: every key with its description, and nothing that is not one.

Knows the keys of other trainers, too, as deprecated ones. What the schema cannot say (that `model` and `model_id`
exclude each other, say) is told by `loradock check` and `loradock train`.
"""

import copy
from typing import Any

from loradock_train.config import TrainConfig
from loradock_train.seed_keys import BOOLEANS, OLD_KEYS, OPTIMISERS, RENAMED, UNUSED


def train_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12."""
    schema = TrainConfig.model_json_schema(mode="validation")
    _flatten(schema)
    properties = schema["properties"]
    for name in sorted(OLD_KEYS):
        properties[name] = _old_key(name, properties)
    properties["optim"]["enum"] += sorted(OPTIMISERS)
    properties["lr_scheduler_type"]["enum"].append("constant_with_warmup")
    properties["report_to"]["anyOf"].append({"enum": ["none", "all"], "type": "string"})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "A training run of Loradock",
    }


def _old_key(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    if name in RENAMED:
        new = RENAMED[name]
        return {**copy.deepcopy(properties[new]), "description": f"Read as {new}.", "deprecated": True}
    if name in UNUSED:
        return {"description": f"Not needed: {UNUSED[name]}.", "deprecated": True}
    kind = {"type": "boolean"} if name in BOOLEANS else {}
    return {**kind, "description": "Another trainer's key; the run says what it is read as.", "deprecated": True}


def _flatten(node: Any) -> None:
    """Descriptions in one line, as editors show them; no titles that only repeat the key."""
    if isinstance(node, list):
        for each in node:
            _flatten(each)
    elif isinstance(node, dict):
        if isinstance(node.get("description"), str):
            node["description"] = " ".join(node["description"].split())
        if isinstance(node.get("title"), str):
            del node["title"]
        if "minLength" in node and ("items" in node or "anyOf" in node):
            node["minItems"] = node.pop("minLength")  # pydantic does not see that the validator before makes a list
        for each in node.values():
            _flatten(each)
