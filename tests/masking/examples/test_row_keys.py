"""Every key that TRL, Axolotl, LLaMA-Factory, ms-swift and OpenAI document for a row, and what becomes of it here."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.conversations import WEATHER_TOOL, assistant, call, system, user
from testkit.tokenizers import tokenizer_for_template

ASKED = [user("Weather in Paris?"), assistant("It is 21 degrees.")]
CALLED = [user("Weather in Paris?"), assistant("", tool_calls=[call({"city": "Paris"})])]
BY_NAME = {"name": "get_weather", "arguments": {"city": "Paris"}}
FUNCTION = WEATHER_TOOL["function"]
IDS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}

# documented by, key → a row with it, and the row it is read as; None: refused with an error that names the key;
# "unread": no effect, listed in the report.
ROWS: dict[tuple[str, str], tuple[dict[str, Any], Any]] = {
    # TRL: data set formats
    ("TRL", "messages"): ({"messages": ASKED}, {"messages": ASKED}),
    ("TRL", "prompt"): ({"prompt": ASKED[:1], "completion": ASKED[1:]}, {"messages": ASKED}),
    ("TRL", "tools"): (
        {"messages": ASKED, "tools": [FUNCTION | {}]},
        {"messages": ASKED, "tools": [FUNCTION]},
    ),
    ("TRL", "chat_template_kwargs"): (
        {"messages": ASKED, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": ASKED, "enable_thinking": False},
    ),
    ("TRL", "chosen"): ({"messages": ASKED, "chosen": ASKED[1:]}, None),
    ("TRL", "rejected"): ({"prompt": "a", "completion": "b", "rejected": "c"}, None),
    ("TRL", "label"): ({"prompt": "a", "completion": "b", "label": False}, None),
    ("TRL", "images"): ({"messages": ASKED, "images": ["cat.png"]}, None),
    ("TRL", "seq_lengths"): ({**IDS, "seq_lengths": [1, 2]}, None),
    # OpenAI: fine-tuning
    ("OpenAI", "weight"): (
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]},
        {"messages": [user("a"), assistant("b", train=False), user("c"), assistant("d")]},
    ),
    ("OpenAI", "arguments"): (
        {"messages": [CALLED[0], assistant(None, tool_calls=[call('{"city": "Paris"}')])]},
        {"messages": [CALLED[0], assistant(None, tool_calls=[call({"city": "Paris"})])]},
    ),
    ("OpenAI", "functions"): ({"messages": ASKED, "functions": [FUNCTION]}, {"messages": ASKED, "tools": [WEATHER_TOOL]}),
    ("OpenAI", "function_call"): (
        {"messages": [CALLED[0], assistant("", function_call={"name": "get_weather", "arguments": '{"city": "Paris"}'})]},
        {"messages": CALLED},
    ),
    ("OpenAI", "role: function"): (
        {"messages": [*CALLED, {"role": "function", "name": "get_weather", "content": "21"}, ASKED[1]]},
        {"messages": [*CALLED, {"role": "tool", "name": "get_weather", "content": "21"}, ASKED[1]]},
    ),
    ("OpenAI", "refusal"): ({"messages": [ASKED[0], assistant(None, refusal="No.")]}, None),
    ("OpenAI", "parallel_tool_calls"): ({"messages": ASKED, "parallel_tool_calls": True}, "unread"),
    # Axolotl: chat_template and its kin
    ("Axolotl", "conversations"): (
        {"conversations": [{"from": "human", "value": "Weather in Paris?"}, {"from": "gpt", "value": "It is 21 degrees."}]},
        {"messages": ASKED},
    ),
    ("Axolotl", "training"): (
        {"messages": [user("a"), assistant("b", training=False), user("c"), assistant("d")]},
        {"messages": [user("a"), assistant("b", train=False), user("c"), assistant("d")]},
    ),
    ("Axolotl", "training_detail"): (
        {"messages": [user("a"), assistant("b", training_detail=[{"begin_offset": 0, "end_offset": 0, "train": True}])]},
        None,
    ),
    ("Axolotl", "content[].train"): (
        {"messages": [user("a"), assistant([{"type": "text", "text": "b", "train": True}])]},
        {"messages": [user("a"), assistant("b")]},
    ),
    ("Axolotl", "instruction"): (
        {"instruction": "Weather in Paris?", "input": "", "output": "It is 21 degrees."},
        {"messages": ASKED},
    ),
    # LLaMA-Factory: alpaca and sharegpt
    ("LLaMA-Factory", "history"): (
        {"instruction": "c", "output": "d", "history": [["a", "b"]]},
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
    ),
    ("LLaMA-Factory", "system"): (
        {"instruction": "Weather in Paris?", "output": "It is 21 degrees.", "system": "Be kind."},
        {"messages": [system("Be kind."), *ASKED]},
    ),
    ("LLaMA-Factory", "function_call, observation"): (
        {
            "conversations": [
                {"from": "human", "value": "Weather in Paris?"},
                {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Paris"}}'},
                {"from": "observation", "value": "21"},
                {"from": "gpt", "value": "It is 21 degrees."},
            ],
            "tools": "[]",
        },
        {
            "messages": [
                CALLED[0],
                {"role": "assistant", "tool_calls": [{"type": "function", "function": BY_NAME}]},
                {"role": "tool", "content": "21"},
                ASKED[1],
            ]
        },
    ),
    ("LLaMA-Factory", "kto_tag"): ({"messages": ASKED, "kto_tag": False}, None),
    ("LLaMA-Factory", "videos"): ({"messages": ASKED, "videos": ["a.mp4"]}, None),
    ("LLaMA-Factory", "audios"): ({"messages": ASKED, "audios": ["a.wav"]}, None),
    # ms-swift: the standard format and what it converts
    ("ms-swift", "loss"): (
        {"messages": [user("a"), assistant("b", loss=False), user("c"), assistant("d", loss=True)]},
        {"messages": [user("a"), assistant("b", train=False), user("c"), assistant("d")]},
    ),
    ("ms-swift", "loss_scale"): ({"messages": [user("a"), assistant("b", loss_scale=2.0)]}, None),
    ("ms-swift", "rejected_response"): ({"messages": ASKED, "rejected_response": "No."}, None),
    ("ms-swift", "rejected_messages"): ({"messages": ASKED, "rejected_messages": ASKED}, None),
    ("ms-swift", "label"): ({"messages": ASKED, "label": 3}, None),
    ("ms-swift", "channel"): ({"messages": ASKED, "channel": "general"}, "unread"),
    ("ms-swift", "query"): (
        {"system": "Be kind.", "query": "c", "response": "d", "history": [["a", "b"]]},
        {"messages": [system("Be kind."), user("a"), assistant("b"), user("c"), assistant("d")]},
    ),
    ("ms-swift", "system_prompt"): (
        {"messages": ASKED, "system_prompt": "Be kind."},
        {"messages": [system("Be kind."), *ASKED]},
    ),
    ("ms-swift", "tool_call, tool_response"): (
        {
            "messages": [
                CALLED[0],
                {"role": "tool_call", "content": '{"name": "get_weather", "arguments": {"city": "Paris"}}'},
                {"role": "tool_call", "content": '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
                {"role": "tool_response", "content": "21"},
                {"role": "tool_response", "content": "5"},
                ASKED[1],
            ]
        },
        {
            "messages": [
                CALLED[0],
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
                        for city in ("Paris", "Oslo")
                    ],
                },
                {"role": "tool", "content": "21"},
                {"role": "tool", "content": "5"},
                ASKED[1],
            ]
        },
    ),
    ("ms-swift", "conversation"): ({"conversation": [{"human": "a", "assistant": "b"}]}, None),
    ("ms-swift", "tool_use parts"): ({"messages": [user("a"), assistant([{"type": "tool_use"}])]}, None),
    # Of interfaces whose answers people keep: reasoning under other names, and answers that are meant to go on
    ("OpenRouter", "reasoning_details"): (
        {"messages": [user("a"), assistant("b", reasoning_details=[{"type": "reasoning.text", "text": "c"}])]},
        None,
    ),
    ("OpenRouter", "reasoning_content, reasoning_details"): (
        {"messages": [user("a"), assistant("b", reasoning_content="c", reasoning_details=[{"text": "c"}])]},
        {"messages": [user("a"), assistant("b", reasoning_content="c")]},
    ),
    ("Anthropic", "thinking_blocks"): ({"messages": [user("a"), assistant("b", thinking_blocks=[{"thinking": "c"}])]}, None),
    ("Mistral", "prefix"): ({"messages": [user("a"), assistant("b", prefix=True)]}, None),
    ("Moonshot", "partial"): ({"messages": [user("a"), assistant("b", partial=True)]}, None),
    ("Moonshot", "partial: false"): (
        {"messages": [user("a"), assistant("b", partial=False)]},
        {"messages": [user("a"), assistant("b")]},
    ),
}  # fmt: skip


def encoded(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    rows = PromptMasker(tokenizer_for_template("qwen3")).encode(row)
    return [(one.input_ids, one.labels) for one in rows]


@pytest.mark.parametrize("key", ROWS, ids=lambda key: " ".join(key))
def test_every_documented_key_is_read_refused_or_listed(key: tuple[str, str]) -> None:
    """M27, M28, M39: what other trainers write into a row has its meaning here, or an error, or a line in the report."""
    row, expected = ROWS[key]
    name = key[1].split(" ")[0].strip(",[]:")
    if expected is None:
        with pytest.raises(MaskingError) as caught:
            encoded(row)
        assert name.split("[")[0] in str(caught.value)
        assert caught.value.code in ("bad_schema", "already_packed")
    elif expected == "unread":
        assert encoded(row) == encoded({"messages": row["messages"]})
        made = mask_dataset(Dataset.from_list([row]), PromptMasker(tokenizer_for_template("qwen3")))
        assert made.report.unread_columns == [name]
        assert name in str(made.report)
    else:
        assert encoded(row) == encoded(expected)


@pytest.mark.parametrize("value", ["false", "True", " no ", "0", "", 0, 1, 0.0], ids=repr)
def test_a_switch_that_no_template_reads_as_a_boolean_is_refused(value: Any) -> None:
    """M28: to a template any text is true, and 0 is not `false`."""
    with pytest.raises(MaskingError, match=r"\[bad_schema\] the switch `enable_thinking`"):
        encoded({"messages": ASKED, "chat_template_kwargs": {"enable_thinking": value}})


def test_a_switch_may_be_text_that_spells_no_boolean() -> None:
    assert encoded({"messages": ASKED, "chat_template_kwargs": {"reasoning_effort": "high"}}) == encoded(
        {"messages": ASKED}
    )


def test_what_the_template_does_not_look_up_is_listed() -> None:
    """M24, M28: keys of messages and switches without effect are counted by row, and those that the template reads are not."""
    rows = [
        {
            "messages": [
                user("a", note="x"),
                assistant("b", note="y", reasoning_content="c"),
                user("d"),
                assistant("e", note="z"),
            ]
        },
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": "21"}, *ASKED], "enable_thinking": False},
        {"messages": ASKED, "chat_template_kwargs": {"enable_thinkng": False}},
        {"messages": [user("a", note="dropped"), {"role": "user", "content": "b"}]},
    ]
    columns = {key: [row.get(key) for row in rows] for key in ("messages", "enable_thinking", "chat_template_kwargs")}
    report = mask_dataset(
        Dataset.from_dict(columns), PromptMasker(tokenizer_for_template("qwen3"), errors="drop")
    ).report
    assert (report.split_rows, report.dropped_rows) == (1, 1)
    assert report.unread_keys == {"messages[].note": 1, "chat_template_kwargs.enable_thinkng": 1}
    assert "messages[].note ×1" in str(report)
