"""Tools: the calls of them, and the schemas that a row offers, each in OpenAI's form.

    call      {"type": "function", "function": {"name": …, "arguments": {…}}}, arguments a mapping:
              "{\\"city\\": \\"Paris\\"}"  →  {"city": "Paris"}        "" or none  →  {}
              "I look it up. {\\"name\\": \\"f\\", …}"  →  content "I look it up.", one call of f
    schemas   `tools` as a list or as JSON text, or OpenAI's older `functions`

Whether a template is given the mapping or JSON text of it is decided by what it renders (`coverage/forms.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.values import Written, drop_none, is_blank, leaves, read_json, schema_error

_FORM = 'Write [{"type": "function", "function": {"name": …, "arguments": {…}}}].'


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """`tool_calls` of a message, which may be JSON text, with arguments that may be."""
    if isinstance(value, str):
        value = None if is_blank(value) else read_json(value, f"{where}: `tool_calls`")
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise schema_error(f"{where}: `tool_calls` must be a list, got {type(value).__name__}.", _FORM)
    return [_call(read_json(call, f"{where}: a call") if isinstance(call, str) else call, where) for call in value]


def read_function_call(value: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's older `function_call` of a message, `{"name": …, "arguments": …}`."""
    if isinstance(value, str):
        value = read_json(value, f"{where}: `function_call`")
    return [] if is_blank(value) else [_call(value, where)]


def read_written_calls(text: Any, where: str) -> tuple[str, list[dict[str, Any]]]:
    """What a call's speaker says: the thought in front, and the call or the list of calls that its JSON holds."""
    if isinstance(text, (Mapping, list, tuple)):
        return "", [_call(call, where) for call in ([text] if isinstance(text, Mapping) else text)]
    if not isinstance(text, str):
        raise schema_error(f"{where} is a call of type {type(text).__name__}.", _FORM)
    failed: MaskingError | None = None
    for start in (i for i, char in enumerate(text) if char in "[{"):
        try:
            calls = read_json(text[start:], where)
        except MaskingError as error:
            failed = failed or error
            continue
        if '"name"' in text[:start]:  # what stands in front is no thought but a call that is broken
            break
        return text[:start].strip(), [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    raise schema_error(
        f"{where} is a call whose text ends in no JSON ({failed.message if failed else 'there is none in it'}).",
        'Give {"name": …, "arguments": {…}} or a list of those, a thought in front if there is one.',
    )


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The schemas of `tools` or `functions`; None where there are none.

    Raises:
        MaskingError: `bad_schema`.
    """
    tools = _schemas(row.get("tools"), "tools")
    functions = [
        tool if "function" in tool else {"type": "function", "function": tool}
        for tool in _schemas(row.get("functions"), "functions")
    ]
    if tools and functions and [_declared(tool) for tool in tools] != [_declared(tool) for tool in functions]:
        raise schema_error("the row has `tools` and other `functions`.", "Keep one; neither is left out silently.")
    return tools or functions or None


def tool_call_texts(call: Mapping[str, Any]) -> list[str]:
    """Name and argument leaves of one tool call; arguments given as a JSON string are read."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return [str(function.get("name", "")), arguments]
    return [str(function.get("name", "")), *leaves(arguments)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if isinstance(function, str):
        function = read_json(function, f"{where}: `function`")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise schema_error(f"{where}: `tool_calls` must be a list of mappings that name a function.", _FORM)
    arguments = _arguments(function.get("arguments", function.get("parameters")), where, function["name"])
    known = ("name", "arguments", "parameters")
    more = drop_none({key: item for key, item in function.items() if key not in known})
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments, **more}}
    if function is not call:
        made |= drop_none({key: item for key, item in call.items() if key not in ("type", "function", *known)})
    return made


def _arguments(value: Any, where: str, name: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        value = {} if is_blank(value) else read_json(value, f"{where}: `arguments` of the call of {name}")
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise schema_error(
            f"{where}: `arguments` of the call of {name} must be a mapping, got {type(value).__name__}.",
            "Give them by name, as a mapping or as JSON text of one.",
        )
    return value if isinstance(value, Written) else drop_none(value)


def _schemas(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):
        value = None if is_blank(value) else read_json(value, f"`{column}`")
    if is_blank(value):
        return []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise schema_error(
            f"`{column}` must be a list of schemas, got {type(value).__name__}.", "See OpenAI's format for tools."
        )
    tools = [read_json(tool, f"`{column}[{i}]`") if isinstance(tool, str) else tool for i, tool in enumerate(value)]
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not isinstance(_declared(tool).get("name"), str):
            raise schema_error(
                f"`{column}[{index}]` is no schema that names a function, but {str(tool)[:60]!r}.",
                'Write {"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}.',
            )
    # A null of a schema in JSON text ("default": null) is there at generation as well.
    return [tool if isinstance(tool, Written) else drop_none(tool) for tool in tools]


def _declared(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool
