"""Conversations that say more than their text: weights, flags, roles, options of the masker."""

from __future__ import annotations

from testkit.conversations.building import (
    TIME_TOOL,
    Conversation,
    assistant,
    call,
    parts,
    system,
    tool,
    user,
)
from testkit.conversations.forms import FORMS

BY_FORM = {conversation.name: conversation.row for conversation in FORMS}

ASKED: tuple[Conversation, ...] = (
    Conversation(
        name="weights",
        row={
            "messages": [
                user("Hello"),
                assistant("A bad answer.", weight=0),
                user("Again"),
                assistant("A good answer.", weight=1),
            ]
        },
    ),
    Conversation(
        name="train_flags",
        row={
            "messages": [
                user("Hello"),
                assistant("Kept.", train=True),
                user("Again"),
                assistant("Not kept.", train=False),
            ]
        },
    ),
    Conversation(
        name="repeated_answer",  # searching for the answer's ids or text finds the wrong place
        row={
            "messages": [user("Say assistant"), assistant("assistant"), user("Say user"), assistant("assistant\nuser")]
        },
    ),
    Conversation(
        name="very_long_turn",
        row={"messages": [user("Count."), assistant(" ".join(str(i) for i in range(2000)))]},
    ),
    Conversation(
        name="starts_with_assistant",
        row={"messages": [assistant("Hello, how can I help?"), user("Bye"), assistant("Bye.")]},
    ),
    Conversation(
        name="ends_with_user",
        row={"messages": [user("Hello"), assistant("Hello."), user("Are you there?")]},
    ),
    Conversation(
        name="greeting_after_system",
        row={
            "messages": [
                system("Be kind."),
                assistant("Hello, how can I help?"),
                user("What is 2 + 2?"),
                assistant("Four."),
                user("Thanks"),
                assistant("Bye."),
            ]
        },
    ),
    Conversation(
        name="developer",
        row={"messages": [{"role": "developer", "content": "Be brief."}, user("Who are you?"), assistant("A helper.")]},
    ),
    Conversation(
        name="developer_as_system",
        options={"roles": {"developer": "system"}},
        row={"messages": [{"role": "developer", "content": "Be brief."}, user("Who are you?"), assistant("A helper.")]},
    ),
    Conversation(
        name="roles_named_otherwise",
        options={"roles": {"critic": "user"}},
        row={
            "messages": [
                {"role": "human", "content": "A line, please."},
                {"role": "gpt", "content": "The sea is blue."},
                {"role": "critic", "content": "Too plain."},
                {"role": "gpt", "content": "The sea forgets its colour."},
            ]
        },
    ),
    Conversation(
        name="several_text_parts",
        row={
            "messages": [
                user([*parts("Look at this:"), *parts("\n2 + 2")]),
                assistant([*parts("It is "), *parts("four.")]),
            ]
        },
    ),
    Conversation(
        name="tool_without_arguments",
        row={
            "messages": [
                user("What time is it?"),
                assistant("", tool_calls=[call("", "get_time")]),
                tool("12:30", "get_time"),
                assistant("Half past twelve."),
            ],
            "tools": [TIME_TOOL],
        },
    ),
    Conversation(name="reasoning_to_inline", options={"reasoning": "inline"}, row=BY_FORM["reasoning_content"]),
    Conversation(name="reasoning_to_drop", options={"reasoning": "drop"}, row=BY_FORM["reasoning_content"]),
    Conversation(
        name="reasoning_with_tools_to_drop", options={"reasoning": "drop"}, row=BY_FORM["reasoning_with_tools"]
    ),
    Conversation(
        name="markup_after_reasoning",  # a template's next tag and the answer begin with the same character
        options={"reasoning": "inline"},
        row={"messages": [user("Make it bold: 42"), assistant("<b>42</b>", reasoning_content="Tags: <b>, </b>.")]},
    ),
)
