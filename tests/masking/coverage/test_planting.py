"""The outline of every beginning of a conversation is that of the beginning planted by itself."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sft_plugins.masking.coverage.planting import DOCUMENTS, TOOLS, outline, plant
from sft_plugins.masking.examples.formats import Conversation
from testkit.conversations import assistant, call, system, tool, user

LOOK_UP = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Which."}}},
    },
}
MESSAGES = [
    system("Be brief."),
    user("Oslo?"),
    assistant("<think>Look it up.</think>One moment.", tool_calls=[call({"city": "Oslo", "days": 2})]),
    tool("21"),
    assistant("Mild.", reasoning_content="Twenty-one."),
    {"role": "user", "content": "And Rome?", "name": "Ada"},
    {"role": "user", "content": " "},
    assistant("", tool_calls=[call({})]),
    assistant("<think>Hot.</think>Sunny."),
    user([{"type": "text", "text": "Thanks."}]),  # type: ignore[arg-type]
    assistant("Gladly."),
]
CONVERSATIONS = {
    "plain": Conversation(MESSAGES[:2] + MESSAGES[-1:], []),
    "all": Conversation(MESSAGES, [], tools=[LOOK_UP], template_kwargs={"documents": [{"title": "D", "text": "t"}]}),
    "bare": Conversation(MESSAGES, []),
    "switched": Conversation(MESSAGES, [], template_kwargs={"enable_thinking": False}),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("longest_first", [False, True])
def test_the_outline_of_a_beginning_is_that_of_the_beginning_alone(name: str, longest_first: bool) -> None:
    conversation = dataclasses.replace(CONVERSATIONS[name])
    ends = range(1, len(conversation.messages) + 1)
    for end in reversed(ends) if longest_first else ends:
        alone = dataclasses.replace(conversation, messages=conversation.messages[:end])
        assert outline(conversation, end) == outline(alone, end)
        assert outline(conversation, end)[1] == plant(conversation, end).slots
        assert plant(conversation, end) == plant(alone, end)


def test_equal_shapes_are_equal_planted_conversations() -> None:
    beginnings = [(one, end) for one in CONVERSATIONS.values() for end in range(1, len(one.messages) + 1)]
    other = [message | {"content": "Else?"} if message == user("Oslo?") else message for message in MESSAGES]
    beginnings.append((Conversation(other, []), len(MESSAGES)))
    equal = 0
    for (a, here), (b, there) in itertools.combinations(beginnings, 2):
        same = plant(a, here).conversation == plant(b, there).conversation
        assert (outline(a, here)[0] == outline(b, there)[0]) == same
        equal += same
    assert equal == 3  # what differs in a text alone, and the first two messages of two conversations


def test_marks_of_tools_and_documents_come_before_those_of_messages() -> None:
    owners = [slot.owner for slot in plant(CONVERSATIONS["all"], len(MESSAGES)).slots]
    assert set(owners[: owners.index(0)]) == {TOOLS, DOCUMENTS}
    of_messages = [owner for owner in owners[owners.index(0) :] if owner >= 0]
    assert of_messages == sorted(of_messages)
