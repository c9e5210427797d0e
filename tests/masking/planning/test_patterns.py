"""Turns by a pattern are those that are planned anew, and a pattern is made only where that is shown."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given

from sft_plugins.masking import PromptMasker
from sft_plugins.masking.planning import patterns
from sft_plugins.masking.planning.patterns import Patterns
from sft_plugins.masking.turns.turns import Turn
from testkit.conversations import TemplateKnobs
from testkit.conversations.random_rows import texts
from testkit.conversations.random_templates import templates
from testkit.properties import quiet
from testkit.tokenizers import CHATML, build_tokenizer, template_names, tokenizer_for_template

# What templates look for in texts, and what looks like it: tags and halves of them, blanks, marks, other spaces, stops.
ODD = [
    "Hello there.", "Why?\n\nSo.", "  two  spaces ", "\n\nlines\n", "<b>x</b>", "[1, 2]", "a </b> c", "<", "<thin", "</",
    "think>", "é\u0301 ß ﬁ 日本", "\u00a0x\u00a0", "Zq00000qZ", "{{ x }}", "yes", "yes", "no", "0", "None", '{"a": 1}',
    "x" * 300, "\u200dx",
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "description": "What."}}}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks.", "parameters": SCHEMA}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(text: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look_up", "arguments": {"text": text}}}


# Conversations of one shape each, out of five texts.
SHAPES: dict[str, Callable[..., dict[str, Any]]] = {
    "chat": lambda a, b, c, d, e: {"messages": [user(a), assistant(b), user(c), assistant(d)]},
    "system": lambda a, b, c, d, e: {"messages": [{"role": "system", "content": e}, user(a), assistant(b)]},
    "two answers": lambda a, b, c, d, e: {"messages": [user(a), assistant(b), assistant(c), user(d), assistant(e)]},
    "flags": lambda a, b, c, d, e: {"messages": [user(a), {**assistant(b), "train": False}, user(c), assistant(d), user(e)]},
    "reasoning": lambda a, b, c, d, e: {
        "messages": [user(a), assistant(b, reasoning_content=f"They say {c} and more."), user(d), assistant(e)]
    },
    "calls": lambda a, b, c, d, e: {
        "messages": [user(a), assistant("", tool_calls=[call(b)]), {"role": "tool", "content": c}, assistant(d), user(e)],
        "tools": [TOOL],
    },
    "thought calls": lambda a, b, c, d, e: {
        "messages": [
            user(a), assistant("", reasoning_content=f"I will look up {b}.", tool_calls=[call(c), call(b)]),
            {"role": "tool", "content": d}, {"role": "tool", "content": d},
            assistant(e, reasoning_content=f"{a} it was, I see."),
        ],
    },
    "switch": lambda a, b, c, d, e: {
        "messages": [user(a), assistant(b), user(c), assistant(d)], "chat_template_kwargs": {"enable_thinking": False},
    },
}  # fmt: skip


def rows_of(shape: str, count: int) -> Iterator[dict[str, Any]]:
    """Plain ones first, of which a pattern is made, then odd ones."""
    for number in range(9):
        yield SHAPES[shape](*(f"{word} {number}." for word in ("One", "Two", "Three", "Four", "Five")))
    odd = itertools.cycle(ODD)
    for _ in range(count):
        yield SHAPES[shape](*itertools.islice(odd, 5))
        next(odd)


def held_to_plans_anew(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From here on every plan by a pattern is made anew as well; how many have been."""
    held: list[int] = []

    def both(self: Patterns, turns: list[Turn], anew: Callable[[], list[Turn]]) -> list[Turn]:
        assert anew() == turns
        held.append(len(turns))
        return turns

    monkeypatch.setattr(Patterns, "_held", both)
    return held


@pytest.mark.parametrize("shape", SHAPES)
def test_patterns_of_real_templates_give_what_is_planned_anew(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = held_to_plans_anew(monkeypatch)
    taken, by_pattern = set(), set()
    for name in template_names():
        before = len(held)
        outcomes = PromptMasker(tokenizer_for_template(name)).encode_batch(rows_of(shape, 30))
        taken |= {name} if any(outcome.rows for outcome in outcomes[:9]) else set()
        by_pattern |= {name} if len(held) > before else set()
    assert len(by_pattern) >= 0.5 * len(taken) > 5, sorted(taken - by_pattern)


@quiet(max_examples=60)
@given(templates(), texts(min_words=1), texts(min_words=1), texts(min_words=1), texts())
def test_patterns_of_random_templates_give_what_is_planned_anew(knobs: Any, a: str, b: str, c: str, d: str) -> None:
    tokenizer = build_tokenizer("bytelevel", chat_template=knobs.jinja(), eos="</s>")
    with pytest.MonkeyPatch.context() as patch:
        held_to_plans_anew(patch)
        for shape in ("chat", "reasoning"):
            rows = [*rows_of(shape, 0), SHAPES[shape](a, b, c, d or "x", a), SHAPES[shape](c, a, b, b, d or "y")]
            PromptMasker(tokenizer).encode_batch(rows)


def patterns_of(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> tuple[Patterns, list[Any]]:
    masker = PromptMasker(tokenizer, **options)
    return masker._planner._patterns, masker.encode_batch(rows)


def chatml() -> Any:
    return build_tokenizer("bytelevel", chat_template=CHATML, eos="</s>")


@pytest.mark.parametrize("which", [0, -1])
def test_a_pattern_that_gives_other_turns_is_found_out_at_once_and_no_more_used(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*rows_of("chat", 40)]
    _, expected = patterns_of(chatml(), rows)
    own = patterns.Pattern._filled

    def wrong(*args: Any) -> list[Turn]:
        turns = own(*args)
        turns[which] = turns[which]._replace(response="no" + turns[which].response)
        return turns

    monkeypatch.setattr(patterns.Pattern, "_filled", wrong)
    made, outcomes = patterns_of(chatml(), rows)
    assert outcomes == expected
    assert (made._used, made._usable) == (1, False)


def test_one_plan_in_so_many_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "EVERY", 5)
    masker = PromptMasker(chatml())
    planned: list[int] = []
    own = masker._planner._anew
    monkeypatch.setattr(masker._planner, "_anew", lambda *args: (planned.append(1), own(*args))[1])
    masker.encode_batch(rows_of("chat", 31))
    assert masker._planner._patterns._used == 35
    assert len(planned) == 5 + 7  # until there was a pattern, and of every fifth plan by it


def test_where_apply_chat_template_writes_otherwise_every_shortcut_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: once there is a pattern, `apply_chat_template` writes a mark that neither it nor any trace has."""
    monkeypatch.setattr(patterns, "EVERY", 2)
    masker, rows = PromptMasker(chatml()), [SHAPES["chat"](f"Q {n}", f"A {n}", "B", "C", "") for n in range(20)]
    masker.encode_batch(rows[:9])
    used = masker._planner._patterns._used
    assert used == 4
    marked = CHATML.replace("{% for m", "Mark.{% for m")
    expected = PromptMasker(build_tokenizer("bytelevel", chat_template=marked, eos="</s>"))
    monkeypatch.setattr(masker._renderer, "_plainly", expected._renderer._plainly)
    made = masker.encode_batch(rows[9:])
    assert (masker._planner._patterns._used, masker._planner._patterns._usable) == (used + 1, False)
    assert not masker._renderer._shortcuts
    assert [one.rows for one in made] == [one.rows for one in expected.encode_batch(rows[9:])]


UNUSUAL = {
    "a thought in the answer": {"messages": [user("Q"), assistant("<think>hm</think>A")]},
    "half of a thought": {"messages": [user("Q"), assistant("hm</think>A")]},
    "a short thought": {"messages": [user("Q"), assistant("A b", reasoning_content="A b")]},
    "a thought that the answer holds": {
        "messages": [user("Q"), assistant("It is forty-two, I think.", reasoning_content="It is forty-two, I think")]
    },
    "two names of thoughts": {"messages": [user("Q"), assistant("A", reasoning_content="x" * 20, thinking="y" * 20)]},
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSUAL)
def test_of_conversations_whose_texts_decide_no_pattern_is_made(what: str) -> None:
    for template in (CHATML, TemplateKnobs(reasoning="strip_history").jinja()):
        tokenizer = build_tokenizer("bytelevel", chat_template=template, eos="</s>")
        made, _ = patterns_of(tokenizer, [UNUSUAL[what]] * 12, ignore_columns=["thinking_"])
        assert made._used == 0


def test_of_conversations_with_documents_no_pattern_is_made() -> None:
    template = "{% for d in documents or [] %}{{ d.text }}\n{% endfor %}" + CHATML
    tokenizer = build_tokenizer("bytelevel", chat_template=template, eos="</s>")
    documents = [{"text": "A page."}]
    rows = [{**SHAPES["chat"]("Q", "A", "B", "C", ""), "chat_template_kwargs": {"documents": documents}}] * 12
    made, outcomes = patterns_of(tokenizer, rows)
    assert made._used == 0
    assert all(len(outcome.rows) == 1 for outcome in outcomes)


def test_a_blank_text_has_no_pattern_of_one_that_is_not() -> None:
    shape = SHAPES["system"]
    rows = [shape("Hi.", "Yo.", "", "", text) for text in [*["Be kind."] * 9, " ", "\n", *["Be kind."] * 3]]
    made, outcomes = patterns_of(chatml(), rows)
    assert made._used == 9 - 3 + 3
    assert all(len(outcome.rows) == 1 for outcome in outcomes)


def test_a_thought_is_looked_for_where_those_before_it_were_empty() -> None:
    """The template drops thoughts, so that of empty ones nothing is lost."""
    tokenizer = build_tokenizer("bytelevel", chat_template=TemplateKnobs(reasoning="drop").jinja(), eos="</s>")
    thoughts = [*[""] * 9, "They want a greeting, and so I greet.", *[""] * 3]
    rows = [{"messages": [user("Hi."), assistant("Yo.", reasoning_content=thought)]} for thought in thoughts]
    made, outcomes = patterns_of(tokenizer, rows)
    assert made._used == 9 - 3 + 3
    assert [[error.code for error in outcome.errors] for outcome in outcomes] == [[]] * 9 + [["content_lost"]] + [
        []
    ] * 3


def test_a_greeting_that_is_trained_has_no_pattern_of_one_that_is_not() -> None:
    """Nothing prompts it: it stays untrained, which the report says."""
    talk = [assistant("Hello."), user("Hi."), assistant("Yo."), user("Hm."), assistant("So.")]
    trained, untrained = {"messages": talk}, {"messages": [{**talk[0], "train": False}, *talk[1:]]}
    made, outcomes = patterns_of(chatml(), [untrained] * 9 + [trained] * 9)
    assert made._used == 4
    assert {
        change for outcome in outcomes[:9] for row in outcome.rows for turn in row.changes for change in turn
    } == set()
    assert all(row.changes[0] == ("greeting_untrained",) for outcome in outcomes[9:] for row in outcome.rows)


def test_texts_that_answer_otherwise_have_a_pattern_of_their_own_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template marks questions that begin with an exclamation mark."""
    role = "{{ '<|im_start|>' + m['role'] + '\n'"
    assert CHATML.count(role) == 1
    template = CHATML.replace(role, "{% if m['content'].startswith('!') %}{{ 'NOTE ' }}{% endif %}" + role)
    held = held_to_plans_anew(monkeypatch)
    tokenizer = build_tokenizer("bytelevel", chat_template=template, eos="</s>")
    rows = [SHAPES["chat"](start + f"Q{n}", "A", "B", "C", "") for n in range(30) for start in ("", "!")]
    made, outcomes = patterns_of(tokenizer, rows)
    assert all(len(outcome.rows) == 1 for outcome in outcomes)
    assert len(held) > 40
    (known,) = made._known.values()
    assert len(known.patterns) == 2


def dropping(template: str, what: str) -> str:
    """`template` that leaves exclamation marks out of `what`."""
    assert what in template
    return template.replace(what, f"{what}.replace('!', '')")


@pytest.mark.parametrize("what", ["m['content']", "m.get('reasoning_content', '')"])
def test_a_text_that_is_lost_is_lost_beside_others_that_are_not(what: str) -> None:
    template = dropping(TemplateKnobs(reasoning="keep").jinja(), what)
    tokenizer = build_tokenizer("bytelevel", chat_template=template, eos="</s>")
    shape = SHAPES["reasoning" if "reasoning" in what else "chat"]
    rows = [shape(f"Q {n}", f"A {n}", f"it is number {n}, surely", "Q", "A") for n in range(12)]
    made, outcomes = patterns_of(tokenizer, [*rows, shape("Q", "A", "so it is, surely!", "Q!", "A!"), *rows])
    assert made._used == 12 - 5 + 12
    assert [outcome.errors[0].code for outcome in outcomes if outcome.errors] == ["content_lost"]
    assert outcomes[12].errors


def test_a_row_that_goes_on_from_a_stop_in_its_text_has_no_pattern_of_one_that_cannot() -> None:
    """The last turn ends on `</s>`, earlier ones otherwise: rows are split, but where an answer brings its own `</s>`."""
    end = "'<|im_end|>'"
    template = CHATML.replace(end, f"('</s>' if loop.last and m['role'] == 'assistant' else {end})")
    assert template != CHATML
    tokenizer = build_tokenizer("bytelevel", chat_template=template, eos="</s>")
    rows = [*rows_of("chat", 0), SHAPES["chat"]("Q", "A</s>", "B", "C", ""), *rows_of("chat", 0)]
    made, outcomes = patterns_of(tokenizer, rows, special_tokens_in_content="allow")
    (alone,) = PromptMasker(tokenizer, special_tokens_in_content="allow").encode_batch([rows[9]])
    assert made._used == 4 + 9
    assert [len(outcome.rows) for outcome in outcomes] == [2] * 9 + [1] + [2] * 9
    assert outcomes[9] == alone


def test_shapes_and_attempts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SHAPES", 8)
    made, outcomes = patterns_of(chatml(), [{"messages": [user("Q"), assistant("A")] * n} for n in range(1, 40)])
    assert len(made._known) <= 9
    assert all(outcome.rows for outcome in outcomes)
    tried: list[int] = []

    def never(self: Patterns, *_: Any) -> Any:
        tried.append(1)
        raise patterns.UndecidedError

    monkeypatch.setattr(Patterns, "_made", never)
    patterns_of(chatml(), [*rows_of("chat", 60)])
    assert len(tried) == patterns._ATTEMPTS
    monkeypatch.setattr(patterns, "_TURNS", 1)
    patterns_of(chatml(), [*rows_of("chat", 60)])
    assert len(tried) == patterns._ATTEMPTS


def test_what_is_refused_is_refused_in_the_same_words() -> None:
    """A stop token in a text, an empty answer: looked for in every row, by whichever way its turns are planned."""
    rows = [
        *rows_of("chat", 0),
        SHAPES["chat"]("Q", "A <|im_end|> B", "C", "D", ""),
        SHAPES["chat"]("Q", " ", "C", "D", ""),
    ]
    _, outcomes = patterns_of(chatml(), rows)
    anew = [PromptMasker(chatml()).encode_batch([row])[0] for row in rows[-2:]]
    codes = [[error.code for error in outcome.errors] for outcome in outcomes[-2:]]
    assert codes == [["special_token_in_content"], ["empty_response"]]
    assert [[str(e) for e in one.errors] for one in anew] == [[str(e) for e in one.errors] for one in outcomes[-2:]]
