"""Axolotl's words for the fields of a row → the rows `PromptMasker` takes.

    field_messages: dialog                              {"dialog": [{"who": "bot", "says": "Hi"}]}
    message_property_mappings: {role: who, content: says}           ↓
    roles: {assistant: [bot]}                           {"messages": [{"role": "assistant", "content": "Hi"}]}

`field_system` and `field_tools` name the columns beside the messages, `system` and `tools` where they are not set.

Without such settings rows pass as they are, in any form the masker knows. A setting that has no meaning for exact masking
is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_plugins.errors import MaskingError

# What each may say without asking for another mask than ours.
_SAME_MASK: dict[str, tuple[Any, ...]] = {
    "roles_to_train": (["assistant"], ["gpt", "assistant"], ["assistant", "gpt"], ["gpt"]),
    "train_on_eos": ("turn",),
    "train_on_eot": ("turn",),
    "drop_system_message": (False,),
    "split_thinking": (False,),
}
_MEANINGLESS = (
    "message_field_training_detail",
    "field",
    "field_human",
    "field_model",
    "input_format",
    "input_transform",
    "conversation",
)


@dataclass(frozen=True)
class RowFields:
    """How rows of one dataset are renamed."""

    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    training: str | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> RowFields:
        """Read them off an entry of `datasets:`.

        Raises:
            MaskingError: `bad_option` for a setting that asks for another mask.
        """
        for name, allowed in _SAME_MASK.items():
            value = entry.get(name)
            if value is not None and value not in allowed:
                raise _refused(name, value, f"only {' or '.join(map(repr, allowed))} is exact masking")
        for name in _MEANINGLESS:
            if entry.get(name):
                raise _refused(name, entry[name], "this strategy does not read it")
        properties = {
            target: source
            for target, source in (entry.get("message_property_mappings") or {}).items()
            if target != source
        }
        thinking = entry.get("field_thinking")
        if thinking:
            properties[entry.get("template_thinking_key") or "reasoning_content"] = thinking
        roles = {source: target for target, sources in (entry.get("roles") or {}).items() for source in sources}
        return cls(
            messages=entry.get("field_messages"),
            system=entry.get("field_system"),
            tools=entry.get("field_tools"),
            properties=properties,
            roles=roles,
            training=entry.get("message_field_training"),
        )

    @property
    def change_nothing(self) -> bool:
        return self == RowFields()

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`row` as the masker takes it.

        Raises:
            MaskingError: `bad_schema` where a named column is not there.
        """
        if self.change_nothing:
            return dict(row)
        column = self.messages or ("messages" if "messages" in row else "conversations")
        if not isinstance(row.get(column), (list, tuple)):
            raise MaskingError(
                f"the row has no list of messages in `{column}`; found columns {', '.join(map(str, row)) or 'none'}.",
                code="bad_schema",
                remedy="Set `field_messages` to the column that holds them.",
            )
        # Other columns stay: the masker knows which of them have a meaning, and refuses those it may not ignore.
        moved = {column, "messages", "conversations", self.system, self.tools}
        renamed: dict[str, Any] = {key: value for key, value in row.items() if key not in moved}
        renamed["messages"] = [self._message(message) for message in row[column]]
        for target, source in (("system", self.system), ("tools", self.tools)):
            if source:
                renamed[target] = row.get(source)
        return renamed

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        moved = set(self.properties.values()) | {self.training}
        renamed = {key: value for key, value in message.items() if key not in moved}
        for target, source in self.properties.items():
            renamed[target] = message.get(source)
        if self.training and message.get(self.training) is not None:
            renamed["train"] = message[self.training]
        renamed["role"] = self.roles.get(renamed.get("role", ""), renamed.get("role"))
        return renamed


def _refused(name: str, value: Any, why: str) -> MaskingError:
    return MaskingError(
        f"`{name}: {value}` in `datasets:` with `type: sft_plugins.integrations.axolotl.strategy`: {why}.",
        code="bad_option",
        remedy=f"Remove `{name}`; what is trained is set under `sft_plugins.masking`, or per message with `weight` or `train`.",
    )
