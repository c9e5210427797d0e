"""Conversations of every form: turns, parts, tools, reasoning."""

from __future__ import annotations

from testkit.conversations.building import WEATHER_TOOL, Conversation, assistant, call, parts, system, tool, user

FORMS: tuple[Conversation, ...] = (
    Conversation(name="one_turn", row={"messages": [user("What is 2 + 2?"), assistant("It is four.")]}),
    Conversation(
        name="many_turns",
        row={
            "messages": [
                user("Hello there!"),
                assistant("Hello! How are you?"),
                user("Fine, thanks. And you?"),
                assistant("I'm fine."),
                user("Say it again."),
                assistant("I'm fine."),
                user("Bye"),
                assistant("Bye!"),
            ]
        },
    ),
    Conversation(
        name="system",
        row={
            "messages": [
                system("You are a helpful assistant.\nAnswer in one line."),
                user("Who are you?"),
                assistant("A helpful assistant."),
                user("Really?"),
                assistant("Yes."),
            ]
        },
    ),
    Conversation(
        name="text_parts",  # what the templates of vision models want
        row={
            "messages": [
                user(parts("What is 2 + 2?")),
                assistant(parts("It is four.")),
                user(parts("And 3 + 3?")),
                assistant(parts("Six.")),
            ]
        },
    ),
    Conversation(
        name="tools",
        row={
            "messages": [
                user("What is the weather in Paris?"),
                assistant("", tool_calls=[call({"city": "Paris", "days": 3})]),
                tool('{"celsius": 21}'),
                assistant("It is 21 degrees in Paris."),
                user("Thanks"),
                assistant("You are welcome."),
            ],
            "tools": [WEATHER_TOOL],
        },
    ),
    Conversation(
        name="tools_with_text_and_two_calls",
        row={
            "messages": [
                user("Weather in Paris and Oslo?"),
                assistant(
                    "Let me look.",
                    tool_calls=[
                        call({"city": "Paris"}, identifier="call00001"),
                        call({"city": "Oslo"}, identifier="call00002"),
                    ],
                ),
                tool("21 degrees", call="call00001"),
                tool("5 degrees", call="call00002"),
                assistant("21 and 5 degrees."),
            ],
            "tools": [WEATHER_TOOL],
        },
    ),
    Conversation(
        name="tool_call_last",
        row={
            "messages": [user("Weather in Paris?"), assistant("", tool_calls=[call({"city": "Paris", "days": 1})])],
            "tools": [WEATHER_TOOL],
        },
    ),
    Conversation(
        name="tool_arguments_as_json_string",  # what OpenAI's API returns
        row={
            "messages": [
                user("Weather in Paris?"),
                assistant(None, tool_calls=[call('{"city": "Paris"}')]),
                tool("21 degrees"),
                assistant("21 degrees."),
            ],
            "tools": [WEATHER_TOOL],
        },
    ),
    Conversation(
        name="reasoning_content",
        row={
            "messages": [
                user("What is 6 * 7?"),
                assistant("42.", reasoning_content="Six times seven.\nThat is 42."),
                user("And 6 * 8?"),
                assistant("48.", reasoning_content="One six more: 48."),
            ]
        },
    ),
    Conversation(
        name="reasoning_key",
        row={"messages": [user("What is 6 * 7?"), assistant("42.", reasoning="Six times seven is 42.")]},
    ),
    Conversation(
        name="thinking_key",
        row={"messages": [user("What is 6 * 7?"), assistant("42.", thinking="Six times seven is 42.")]},
    ),
    Conversation(
        name="reasoning_inline",
        row={
            "messages": [
                user("What is 6 * 7?"),
                assistant("<think>\nSix times seven.\n</think>\n\n42."),
                user("And 6 * 8?"),
                assistant("<think>\nOne six more.\n</think>\n\n48."),
            ]
        },
    ),
    Conversation(
        name="reasoning_with_tools",
        row={
            "messages": [
                user("What is the weather in Paris?"),
                assistant("", reasoning_content="I should look it up.", tool_calls=[call({"city": "Paris"})]),
                tool("21 degrees"),
                assistant("21 degrees.", reasoning_content="The tool says 21."),
            ],
            "tools": [WEATHER_TOOL],
        },
    ),
    Conversation(
        name="thinking_off",  # the templates of hybrid reasoners close the block in the generation prompt
        row={
            "messages": [user("What is 6 * 7?"), assistant("42."), user("And 6 * 8?"), assistant("48.")],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ),
)
