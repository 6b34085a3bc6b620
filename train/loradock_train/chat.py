"""Chats: what is wrong with a row in the OpenAI shape, its old names, and how the engine hands it to a chat template.

Errors are in the wording of OpenAI's own validation where it has one. Knows nothing of tokens or files.
"""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from loradock_train.images import check_number, check_parts

ROLES = ("system", "developer", "user", "assistant", "tool")

Values = dict[str, Any]

# ---- old names -------------------------------------------------------------------------------------------------------


def has_functions(values: Mapping[str, Any]) -> bool:
    """Whether the row is in the shape before tools: `functions`, `function_call`, the role `function`."""
    messages = values.get("messages")
    found = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    return "functions" in values or any("function_call" in m or m.get("role") == "function" for m in found)


def functions_as_tools(values: Mapping[str, Any]) -> Values:
    """The same row with `tools`, `tool_calls` and the role `tool`. What is malformed stays as it is, for check_chat."""
    translated = {key: value for key, value in values.items() if key != "functions"}
    functions = values.get("functions")
    if isinstance(functions, list):
        translated["tools"] = [{"type": "function", "function": function} for function in functions]
    elif functions is not None:
        translated["tools"] = functions
    messages = values.get("messages")
    if isinstance(messages, list):
        translated["messages"] = [_new_message(message) for message in messages]
    return translated


def _new_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    translated = {key: value for key, value in message.items() if key != "function_call"}
    if message.get("role") == "function":
        translated["role"] = "tool"
    if message.get("function_call") is not None:
        translated["tool_calls"] = [{"type": "function", "function": message["function_call"]}]
    return translated


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_chat(values: Mapping[str, Any], file: str | None = None) -> Iterator[str]:
    """What is wrong with a row to learn from. One in the old shape is looked at as it will be read, with tools.

    file: where the row stands, which its images lie beside.
    """
    if has_functions(values):
        values = functions_as_tools(values)
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        yield "missing key 'messages'" if messages is None else "'messages' must be a non-empty list"
        return
    yield from check_tools(values)
    parallel = values.get("parallel_tool_calls") is not False
    yield from check_messages(messages, "messages", tool_names(values), parallel, file)
    yield from check_number(messages)
    first = messages[0]
    if isinstance(first, dict) and first.get("role") == "assistant" and first.get("weight", 1) == 1:
        yield "messages[0]: an answer that nothing comes before is never asked for; set weight: 0, or put one before it"
    learnt = any(m.get("role") == "assistant" and m.get("weight", 1) == 1 for m in messages if isinstance(m, dict))
    if not learnt:
        yield "Example has no assistant message to learn from (at least one with weight 1 is needed)"


def tool_names(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the row's tools; None where it has none, or where they are malformed."""
    tools = values.get("tools")
    if not tools or not isinstance(tools, list):
        return None
    named = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    names = tuple(function["name"] for function in named if isinstance(function, dict) and "name" in function)
    return names if len(names) == len(tools) and all(isinstance(name, str) for name in names) else None


def check_tools(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with `tools` and `parallel_tool_calls`."""
    if not isinstance(values.get("parallel_tool_calls", True), bool):
        yield f"'parallel_tool_calls' must be true or false, found {type(values['parallel_tool_calls']).__name__}"
    tools = values.get("tools")
    if tools is None:
        return
    if not isinstance(tools, list):
        yield f"'tools' must be a list, found {type(tools).__name__}"
        return
    for index, tool in enumerate(tools):
        yield from _check_tool(tool, f"tools[{index}]")
    names = tool_names(values) or ()
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"'tools' has {name!r} more than once"


def _check_tool(tool: Any, place: str) -> Iterator[str]:
    function = yield from _function_of(tool, place)
    if function is None:
        return
    yield from _check_name(function, f"{place}.function")
    if not isinstance(function.get("description"), str | None):
        yield f"'{place}.function.description' must be a string, found {type(function['description']).__name__}"
    if not isinstance(function.get("parameters"), dict | None):
        yield f"'{place}.function.parameters' must be an object, found {type(function['parameters']).__name__}"


def _function_of(holder: Any, place: str) -> Generator[str, None, Values | None]:
    """The `function` object of a tool or a call; None (after saying why) where there is none."""
    if not isinstance(holder, dict):
        yield f"{place}: expected an object, found {type(holder).__name__}"
        return None
    if holder.get("type", "function") != "function":
        yield f"Invalid value: {holder['type']!r} at '{place}.type'. Supported values are: 'function'."
        return None
    if "function" not in holder:
        yield f"Missing required parameter: '{place}.function'."
        return None
    if not isinstance(holder["function"], dict):
        yield f"'{place}.function' must be an object, found {type(holder['function']).__name__}"
        return None
    function: Values = holder["function"]
    return function


def _check_name(function: Values, place: str) -> Iterator[str]:
    if "name" not in function:
        yield f"Missing required parameter: '{place}.name'."
    elif not isinstance(function["name"], str) or not function["name"]:
        yield f"'{place}.name' must be a non-empty string"


def check_messages(
    messages: Sequence[Any],
    key: str,
    tools: Sequence[str] | None,
    allows_parallel: bool = True,
    file: str | None = None,
) -> Iterator[str]:
    """What is wrong with each message. `tools`: the names that may be called; None: any. `file`: what images lie
    beside; None: there may be none."""
    open_ids: set[Any] | None = None  # of the calls that tool messages here may answer
    for index, message in enumerate(messages):
        place = f"{key}[{index}]"
        if not isinstance(message, dict):
            yield f"{place}: expected an object, found {type(message).__name__}"
            continue
        role, calls = message.get("role"), message.get("tool_calls")
        if role not in ROLES:
            yield f"{place}: invalid role {role!r}; expected one of {', '.join(ROLES)}"
        yield from _check_content(message, place, file)
        yield from _check_weight(message, place)
        if calls is not None and role != "assistant":
            yield f"{place}: 'tool_calls' belong to assistant messages only"
        elif calls is not None:
            yield from _check_calls(calls, f"{place}.tool_calls", tools, allows_parallel)
        if role == "tool":
            yield from _check_answer(message, place, open_ids)
        else:
            open_ids = {call.get("id") for call in calls if isinstance(call, dict)} if isinstance(calls, list) else None


def _check_content(message: Values, place: str, file: str | None) -> Iterator[str]:
    """Only an assistant that calls a tool may say nothing."""
    content = message.get("content")
    if isinstance(content, list):
        yield from check_parts(content, message.get("role"), place, file)
        return
    has_calls = message.get("role") == "assistant" and bool(message.get("tool_calls"))
    if not isinstance(content, str) and not (content is None and has_calls):
        yield f"{place}: missing or non-string 'content'"


def _check_weight(message: Values, place: str) -> Iterator[str]:
    weight = message.get("weight", 1)
    if "weight" in message and (message.get("role") != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        yield f"{place}: 'weight' must be 0 or 1, and on assistant messages only"


def _check_calls(calls: Any, place: str, tools: Sequence[str] | None, allows_parallel: bool) -> Iterator[str]:
    if not isinstance(calls, list):
        yield f"'{place}' must be a list, found {type(calls).__name__}"
        return
    if len(calls) > 1 and not allows_parallel:
        yield f"'{place}' has {len(calls)} calls, but 'parallel_tool_calls' is false"
    for index, call in enumerate(calls):
        where = f"{place}[{index}]"
        function = yield from _function_of(call, where)
        if function is None:
            continue
        yield from _check_name(function, f"{where}.function")
        yield from _check_arguments(function, f"{where}.function")
        name = function.get("name")
        if tools is not None and isinstance(name, str) and name not in tools:
            yield f"'{where}.function.name' is {name!r}, which is not among the row's tools ({', '.join(tools)})"


def _check_arguments(function: Values, place: str) -> Iterator[str]:
    """The engine reads what is no JSON object as {}: the model would learn to call without arguments."""
    if "arguments" not in function:
        yield f"Missing required parameter: '{place}.arguments'."
        return
    arguments = function["arguments"]
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            yield f"'{place}.arguments' is not valid JSON: {error.msg} at column {error.colno}"
            return
    if arguments != "" and not isinstance(arguments, dict):
        yield f"'{place}.arguments' must be a JSON object, found {type(arguments).__name__}"


def _check_answer(message: Values, place: str, open_ids: set[Any] | None) -> Iterator[str]:
    if open_ids is None:
        yield f"{place}: messages with role 'tool' must be a response to a preceding message with 'tool_calls'."
        return
    named = open_ids - {None}
    answered = message.get("tool_call_id")
    if answered is None and named:
        yield f"Missing required parameter: '{place}.tool_call_id'."
    elif answered is not None and answered not in named:
        told = ", ".join(sorted(map(str, named))) or "none"
        yield f"{place}: 'tool_call_id' {answered!r} is not among the ids of the calls before it ({told})"


# ---- as the engine renders it ----------------------------------------------------------------------------------------


def as_served(values: Mapping[str, Any]) -> tuple[list[Values], list[Values] | None]:
    """Messages and tools as vLLM's chat endpoint hands them to the template.

    Arguments of calls are objects there, not the JSON texts of the OpenAI shape (a template that writes them with
    `tojson` would else escape them twice); no content is an empty text; a tool has its description and parameters,
    None where not given, and nothing but what the API knows. Without `weight`, which is ours.
    """
    if has_functions(values):
        values = functions_as_tools(values)
    tools = values.get("tools")
    return [_served_message(m) for m in values["messages"]], None if tools is None else [_served_tool(t) for t in tools]


def _served_message(message: Values) -> Values:
    served = {key: value for key, value in message.items() if key not in ("weight", "tool_calls")}
    if served.get("content") is None:
        served["content"] = ""
    if message.get("tool_calls"):
        served["tool_calls"] = [_served_call(call) for call in message["tool_calls"]]
    return served


def _served_call(call: Values) -> Values:
    function = dict(call["function"])
    if isinstance(function["arguments"], str):
        function["arguments"] = json.loads(function["arguments"]) if function["arguments"] else {}
    return {**call, "type": "function", "function": function}


def _served_tool(tool: Values) -> Values:
    function = tool["function"]
    served = {name: function.get(name) for name in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        served["strict"] = function["strict"]
    return {"type": "function", "function": served}
