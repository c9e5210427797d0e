"""The shortcuts of masking (one rendering for all prefixes, texts cut at special tokens) change no character and no id."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_plugins.errors import MaskingError
from sft_plugins.masking.coverage.forms import Forms
from sft_plugins.masking.examples.columns import Reading
from sft_plugins.masking.examples.formats import Conversation, parse_example
from sft_plugins.masking.rendering.prefixes import WatchedTemplate
from sft_plugins.masking.rendering.quick import QuickConversation
from sft_plugins.masking.rendering.template import ChatRenderer, TurnText
from testkit.conversations import BY_NAME, CONVERSATIONS, TemplateKnobs, conversations, templates
from testkit.properties import quiet
from testkit.renderings import counting, counting_plain_ones
from testkit.tokenizers import CHATML, build_tokenizer, template_names, tokenizer_for_template

MANY = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "Hi again!"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Enough."},
]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *MANY]
BODY = "<{{ m['role'] }}>{{ m['content'] }}</s>"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


@functools.cache
def bare_tokenizer() -> Any:
    return build_tokenizer("qwen", chat_template=None)


def texts(renderer: ChatRenderer, conversation: Conversation, *, shortcut: bool) -> list[TurnText] | str:
    indices = [i for i, trained in enumerate(conversation.trainable) if trained and i]
    try:
        return renderer.turns(conversation, indices, shortcut=shortcut) if indices else []
    except MaskingError as error:
        return error.code


def both(template: str, messages: list[dict[str, str]], **kwargs: Any) -> tuple[Any, Any]:
    conversation = Conversation(
        messages, [m["role"] == "assistant" for m in messages], template_kwargs=kwargs.pop("template_kwargs", {})
    )
    renderer = ChatRenderer(bare_tokenizer(), template)
    return tuple(texts(renderer, conversation, shortcut=shortcut) for shortcut in (True, False))  # type: ignore[return-value]


def parsed(row: dict[str, Any]) -> Conversation | None:
    try:
        conversation = parse_example(row, Reading())
    except MaskingError:
        return None
    return conversation if isinstance(conversation, Conversation) else None


# ---------------------------------------------------------------------------------------------------------------------
# Real templates
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", template_names())
def test_one_rendering_gives_what_rendering_every_prefix_gives(name: str) -> None:
    renderer = ChatRenderer(tokenizer_for_template(name))
    compared = 0
    for entry in CONVERSATIONS:
        conversation = parsed(entry.for_tokenizer("</s>"))
        if conversation is None:
            continue
        conversation = Forms(renderer).choose(conversation).of(conversation)
        plain = texts(renderer, conversation, shortcut=False)
        assert texts(renderer, conversation, shortcut=True) == plain, entry.name
        compared += isinstance(plain, list) and len(plain) > 1
    assert compared  # several supervised turns, rendered without error


def test_most_real_templates_take_the_shortcut() -> None:
    """Guard: else the comparisons above would compare plain renderings with themselves."""
    taken = []
    conversation = parsed(BY_NAME["many_turns"].for_tokenizer(""))
    assert conversation is not None
    for name in template_names():
        render = functools.partial(texts, ChatRenderer(tokenizer_for_template(name)), conversation, shortcut=True)
        (made, plain), quick = counting(QuickConversation, "render", functools.partial(counting_plain_ones, render))
        if isinstance(made, list) and not quick and plain == 2:  # the two that hold the first conversation to it
            taken.append(name)
    assert len(taken) >= min(25, 0.4 * len(template_names())), sorted(set(template_names()) - set(taken))


# ---------------------------------------------------------------------------------------------------------------------
# Random templates
# ---------------------------------------------------------------------------------------------------------------------


@quiet(max_examples=120)
@given(row=conversations(max_turns=4), knobs=templates())
def test_random_templates_render_the_same_with_and_without_the_shortcut(
    row: dict[str, Any], knobs: TemplateKnobs
) -> None:
    conversation = parsed(row)
    if conversation is None:
        return
    renderer = ChatRenderer(bare_tokenizer(), knobs.jinja())
    assert texts(renderer, conversation, shortcut=True) == texts(renderer, conversation, shortcut=False)


# Pieces that look at the messages in ways a prefix would notice, or would not, put together at random.
_BEFORE = st.sampled_from([
    "", "{{ messages | length }}", "{{ messages[0]['content'] }}", "{{ messages[-1]['role'] }}", "{{ messages[2]['content'] }}",
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
    "{{ messages | map(attribute='content') | join(',') }}", "{{ (messages | first)['role'] }}",
    "{% if messages[1:] %}more{% endif %}", "{% if messages[3:] == [] %}short{% endif %}", "{{ messages }}",
])  # fmt: skip
_INSIDE = st.sampled_from([
    "", "{% if loop.last %}!{% endif %}", "{{ loop.index }}", "{{ loop.length }}", "{{ loop.revindex }}",
    "{% if loop.nextitem is defined %}{{ loop.nextitem['role'] }}{% endif %}", "{{ loop.previtem['role'] if loop.previtem }}",
    "{% set ns.n = ns.n + 1 %}", "{{ ns.last }}", "{% if m is eq(messages[-1]) %}?{% endif %}", "{{ c.next() }}",
    "{% for x in messages[loop.index:] %}{{ x['role'][:1] }}{% endfor %}", "{% for x in messages[1:] %}.{% endfor %}",
    "{% for x in messages[1:] %}.{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}|",
    "{% for x in messages[:loop.index] %}.{% endfor %}", "{{ messages[loop.index0 - 1]['role'] }}", "{{ messages }}",
    "{% if messages[loop.index] is defined %}>{% endif %}", "{{ messages.index(m) }}", "{{ loop.changed(m['role']) }}",
    "{% if add_generation_prompt %}+{% endif %}", "{{ note() }}", "{{ more() }}",
])  # fmt: skip
_WHEN = st.sampled_from(["", "m['role'] == 'assistant'", "loop.index0 == 1", "loop.index0 == 3", "not loop.first"])
_LOOP = st.sampled_from([
    "{% for m in messages %}", "{% for m in messages[1:] %}", "{% for m in all %}", "{% for m in messages | list %}",
    "{% for m in messages if m['role'] != 'system' %}", "{% for m in messages if m['content'] != 'Again' %}",
    "{% for m in messages recursive %}", "{% for m in messages | selectattr('content') %}",
    "{% for m in messages[:-1] + messages[-1:] %}",
])  # fmt: skip
_AFTER = st.sampled_from([
    "", "{{ ns.n }}", "{{ ns.n > 2 }}", "{{ other.n > 2 }}", "{{ messages | length > 3 }}",
    "{{ all[-1]['role'] }}", "{{ note() }}", "{{ c.current }}",
    "{{ bos_token }}",
])  # fmt: skip


@quiet(max_examples=250)
@given(
    before=_BEFORE,
    inside=st.lists(st.tuples(_WHEN, _INSIDE), max_size=3),
    loop=_LOOP,
    after=_AFTER,
    messages=st.sampled_from([MANY, WITH_SYSTEM, MANY[:4]]),
    bare=st.booleans(),
)
def test_templates_that_look_around_render_the_same_with_and_without_the_shortcut(
    before: str, inside: list[tuple[str, str]], loop: str, after: str, messages: list[dict[str, str]], bare: bool
) -> None:
    body = "".join(f"{{% if {when} %}}{what}{{% endif %}}" if when else what for when, what in inside)
    template = (
        "{% set ns = namespace(n=0, last=-1) %}{% set other = ns %}{% set all = messages %}{% set c = cycler('a', 'b', 'c') %}"
        "{% macro note() %}[{{ ns.n > 2 }}]{% endmacro %}{% macro more() %}{% set ns.n = ns.n + 1 %}{% endmacro %}"
        + before
        + loop
        + BODY
        + body
        + "{% endfor %}"
        + after
        + PROMPT
    )
    fast, plain = both(template if not bare else template.replace(BODY, "{{ m['content'] }}"), messages)
    assert fast == plain, template


# ---------------------------------------------------------------------------------------------------------------------
# Nasty templates by name
# ---------------------------------------------------------------------------------------------------------------------

FOR, END = "{% for m in messages %}", "{% endfor %}"
NASTY = {
    "loop_last": FOR + BODY + "{% if not loop.last %}\n{% endif %}" + END + PROMPT,
    "loop_last_for_answers": FOR + BODY + "{% if m.role == 'assistant' and loop.last %}!{% endif %}" + END + PROMPT,
    "loop_length": FOR + BODY + "{{ loop.length }}" + END + PROMPT,
    "loop_revindex": FOR + BODY + "{% if loop.revindex == 1 %}!{% endif %}" + END + PROMPT,
    "loop_nextitem": FOR + BODY + "{% if loop.nextitem and loop.nextitem.role == 'user' %}!{% endif %}" + END + PROMPT,
    "count_first": "{{ messages | length }}" + FOR + BODY + END + PROMPT,
    "count_inside": FOR + BODY + "{% if loop.index == messages | length %}!{% endif %}" + END + PROMPT,
    "count_after": FOR + BODY + END + "{{ messages | length }}" + PROMPT,
    "last_message_first": "{{ messages[-1].role }}" + FOR + BODY + END + PROMPT,
    "last_message_after": FOR + BODY + END + "{% if messages[-1].role == 'user' %}?{% endif %}" + PROMPT,
    "alias_after": "{% set all = messages %}" + FOR + BODY + END + "{{ all[-1].role }}" + PROMPT,
    "prescan": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}" + FOR + BODY + "{% if loop.index0 > ns.last %}!{% endif %}" + END + PROMPT,
    "slice": "{{ messages[0].content }}{% for m in messages[1:] %}" + BODY + END + PROMPT,
    "slice_to_end": "{% for m in messages[:-1] %}" + BODY + END + "{{ messages[-1].content }}" + PROMPT,
    "empty_slice": "{% if messages[1:] == [] %}alone{% endif %}" + FOR + BODY + END + PROMPT,
    "namespace_after": "{% set ns = namespace(n=0) %}"
    + FOR + BODY + "{% set ns.n = ns.n + 1 %}" + END + "{{ ns.n > 2 }}" + PROMPT,
    "namespace_alias_after": "{% set ns = namespace(n=0) %}{% set other = ns %}"
    + FOR + BODY + "{% set ns.n = ns.n + 1 %}" + END + "{{ other.n > 2 }}" + PROMPT,
    "namespace_by_macro_after": "{% set ns = namespace(n=0) %}{% macro note() %}{{ ns.n > 2 }}{% endmacro %}"
    + FOR + BODY + "{% set ns.n = ns.n + 1 %}" + END + "{{ note() }}" + PROMPT,
    "namespace_set_by_macro": "{% set ns = namespace(n=0) %}{% macro more() %}{% set ns.n = ns.n + 1 %}{% endmacro %}"
    + FOR + BODY + "{{ more() }}" + END + "{{ ns.n > 2 }}" + PROMPT,
    "cycler_after": "{% set c = cycler('a', 'b', 'c', 'c', 'c', 'c', 'c') %}"
    + FOR + BODY + "{{ c.next() }}" + END + "{{ c.current }}" + PROMPT,
    "set_block": "{% set all %}" + FOR + BODY + END + "{% endset %}{{ all | trim }}" + PROMPT,
    "filter_block": "{% filter upper %}" + FOR + BODY + END + "{% endfilter %}" + PROMPT,
    "generation_prompt_inside": FOR + BODY
    + "{% if add_generation_prompt and m.role == 'user' %}!{% endif %}" + END + PROMPT,
    "generation_prompt_by_name": "{% set flag = add_generation_prompt %}"
    + FOR + BODY + "{% if flag %}!{% endif %}" + END + PROMPT,
    "generation_prompt_by_macro": "{% macro note() %}{% if add_generation_prompt %}!{% endif %}{% endmacro %}"
    + FOR + BODY + "{{ note() }}" + END + PROMPT,
    "filtered": "{% for m in messages if m.role != 'system' %}" + BODY + END + PROMPT,
    "filtered_with_last": "{% for m in messages if m.role != 'system' %}"
    + BODY + "{% if loop.last %}!{% endif %}" + END + PROMPT,
    "nested": FOR + BODY + "{% for x in messages %}{{ x.role[:1] }}{% endfor %}" + END + PROMPT,
    "nested_slice": FOR + BODY
    + "{% if m.role == 'assistant' %}{% for x in messages[1:] %}.{% endfor %}|{% endif %}" + END + PROMPT,
    "look_ahead": FOR + BODY + "{% if m.role == 'assistant' %}{% for x in messages[loop.index:] %}{{ x.role[:1] }}{% endfor %}|"
    "{% endif %}" + END + PROMPT,
    "look_ahead_and_break": FOR + BODY + "{% if loop.index0 == 1 %}{% for x in messages[1:] %}.{% if loop.index == 2 %}"
    "{% break %}{% endif %}{% endfor %}|{% endif %}" + END + PROMPT,
    "look_back": FOR + BODY + "{% if loop.index0 and messages[loop.index0 - 1].role == 'user' %}!{% endif %}" + END + PROMPT,
    "twice": FOR + "{{ m.role }}" + END + FOR + BODY + END + PROMPT,
    "macro_per_message": "{% macro one(m) %}" + BODY + "{% endmacro %}" + FOR + "{{ one(m) }}" + END + PROMPT,
    "macro_for_all": "{% macro all(messages) %}" + FOR + BODY + END + "{% endmacro %}{{ all(messages) }}" + PROMPT,
    "break": FOR + "{% if loop.index0 == 3 %}{% break %}{% endif %}" + BODY + END + PROMPT,
    "continue": FOR + "{% if m.content == 'Again' %}{% continue %}{% endif %}" + BODY + END + PROMPT,
    "recursion": "{% for m in messages recursive %}" + BODY + END + PROMPT,
    "printed": FOR + BODY + "{% if loop.index0 == 3 %}{{ messages }}{% endif %}" + END + PROMPT,
    "joined": FOR + BODY + "{% if loop.index0 == 3 %}{{ messages | map(attribute='role') | join }}{% endif %}" + END + PROMPT,
    "raises_on_roles": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + BODY + END + PROMPT,
    "else_branch": "{% if tools %}{% for m in messages %}T" + BODY + END
    + "{% else %}" + FOR + BODY + END + "{% endif %}" + PROMPT,
    "loop_over_something_else": FOR + BODY + END + "{% for x in 'abc' %}{{ x }}{% endfor %}" + PROMPT,
}  # fmt: skip
# What reading tells of itself and no later prefix can notice: here the shortcut must be taken.
HARMLESS = {
    "plain": FOR + BODY + END + PROMPT,
    "chatml": CHATML,
    "first_message": "{% if messages[0].role == 'system' %}S{% endif %}" + FOR + BODY + END + PROMPT,
    "look_back": FOR + "{% if loop.index0 and messages[loop.index0 - 1].role == 'user' %}!{% endif %}"
    + BODY + END + PROMPT,
    "counter": "{% set ns = namespace(n=0) %}" + FOR + BODY + "{% set ns.n = ns.n + 1 %}{{ ns.n }}" + END + PROMPT,
    "slice": "{% set rest = messages[1:] %}{{ messages[0].content }}{% for m in rest %}" + BODY + END + PROMPT,
    "kwargs_after": FOR + BODY + END
    + "{% if add_generation_prompt %}<assistant>{% if not thinking %}<t></t>{% endif %}{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("messages", [MANY, WITH_SYSTEM], ids=["plain", "system"])
@pytest.mark.parametrize("name", NASTY)
def test_nasty_templates_render_the_same_with_and_without_the_shortcut(
    name: str, messages: list[dict[str, str]]
) -> None:
    fast, plain = both(NASTY[name], messages)
    assert fast == plain
    assert plain == "template_error" or len(plain) == 3


@pytest.mark.parametrize("name", HARMLESS)
def test_templates_that_only_look_back_take_the_shortcut(name: str) -> None:
    fast, plain = both(HARMLESS[name], MANY)
    assert fast == plain
    found = WatchedTemplate(HARMLESS[name]).prefixes(MANY, {})
    assert found is not None
    assert set(found.texts) >= {2, 3, 4, 5, 6}


# What the generation prompt adds, by way of the first message.
TAILS = {
    "set": "{% set tail = messages[0].role %}" + FOR + BODY + END + "{% if add_generation_prompt %}{{ tail }}{% endif %}",
    "set_by_way": "{% set a = messages[0].role %}{% set b = a ~ '!' %}" + FOR + BODY + END
    + "{% if add_generation_prompt %}{{ b }}{% endif %}",
    "set_under_if": "{% set s = 'u' %}{% if messages[0].role == 'system' %}{% set s = 's' %}{% endif %}" + FOR + BODY + END
    + "{% if add_generation_prompt %}{{ s }}{% endif %}",
    "namespace": "{% set ns = namespace(s='u') %}{% if messages[0].role == 'system' %}{% set ns.s = 's' %}{% endif %}"
    + FOR + BODY + END + "{% if add_generation_prompt %}{{ ns.s }}{% endif %}",
    "macro": "{% set s = messages[0].role %}{% macro tail() %}{{ s }}{% endmacro %}" + FOR + BODY + END
    + "{% if add_generation_prompt %}{{ tail() }}{% endif %}",
    "macro_under_if": "{% if messages[0].role == 'system' %}{% macro tail() %}s{% endmacro %}{% else %}"
    "{% macro tail() %}u{% endmacro %}{% endif %}" + FOR + BODY + END
    + "{% if add_generation_prompt %}{{ tail() }}{% endif %}",
    "read_behind": FOR + BODY + END + "{% if add_generation_prompt %}{{ messages[0].role }}{% endif %}",
    "switch": FOR + BODY + END + "{% if add_generation_prompt %}<{{ 's' if thinking else 'u' }}>{% endif %}",
}  # fmt: skip


def conversation_of(messages: list[dict[str, str]], **kwargs: Any) -> Conversation:
    return Conversation(messages, [m["role"] == "assistant" for m in messages], template_kwargs=kwargs)


@pytest.mark.parametrize("name", TAILS)
def test_a_remembered_tail_of_the_prompt_is_that_of_the_conversation(name: str) -> None:
    """One renderer for all of them, as in a data set, so that what is remembered of one serves the next."""
    renderer = ChatRenderer(bare_tokenizer(), TAILS[name])
    rows = [conversation_of(MANY), conversation_of(WITH_SYSTEM), conversation_of(MANY, thinking=True)] * 2
    made = [texts(renderer, row, shortcut=True) for row in rows]
    assert made == [texts(renderer, row, shortcut=False) for row in rows]
    assert len({row[-1].prompt[-5:] for row in made if not isinstance(row, str)}) == 2


def test_a_second_conversation_is_rendered_once_and_one_in_a_while_is_held_to_the_plain_rendering() -> None:
    renderer = ChatRenderer(bare_tokenizer(), CHATML)
    calls = [
        counting_plain_ones(lambda row=row: texts(renderer, conversation_of(row), shortcut=True))[1]
        for row in [MANY, WITH_SYSTEM] * 40
    ]
    assert calls[:3] == [2, 0, 0]
    assert sum(calls) == 4


def test_what_the_watched_rendering_got_wrong_is_rendered_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortcut that were wrong after all: found where the plain rendering is looked at, and not taken there."""
    right = WatchedTemplate.prefixes

    def wrong(self: WatchedTemplate, *args: Any) -> Any:
        found = right(self, *args)
        assert found is not None
        return found._replace(texts={j: text.replace("!", "?") for j, text in found.texts.items()})

    monkeypatch.setattr(WatchedTemplate, "prefixes", wrong)
    fast, plain = both(CHATML, MANY)
    assert fast == plain


def test_documents_given_to_the_template_reach_every_prefix() -> None:
    before = "{% for d in documents or [] %}{{ d.title }}{% endfor %}" + FOR + BODY + END + PROMPT
    inside = (
        FOR + "{% if m.role == 'assistant' and documents %}{{ documents[0].title }}{% endif %}" + BODY + END + PROMPT
    )
    after = FOR + BODY + END + "{% if documents %}{{ documents[0].title }}{% endif %}" + PROMPT
    for source in (before, inside, after):
        fast, plain = both(source, MANY, template_kwargs={"documents": [{"title": "D1", "text": "x"}]})
        assert fast == plain
        assert "D1" in plain[-1].full
