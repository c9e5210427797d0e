"""What is traced and what is not, for how long, and that real templates and random ones write the same by traces."""

from __future__ import annotations

import datetime
import itertools
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from sft_plugins.errors import MaskingError
from sft_plugins.masking.coverage.forms import Forms
from sft_plugins.masking.examples.columns import Reading
from sft_plugins.masking.examples.formats import Conversation, parse_example
from sft_plugins.masking.rendering import traced
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.rendering.traced import TracedTemplate
from testkit.conversations import BY_NAME, TemplateKnobs, templates
from testkit.properties import quiet
from testkit.shapes import END, FOR, TEXTS, held, oracle, rows
from testkit.tokenizers import build_tokenizer, template_names, tokenizer_for_template

FOLLOWED = {
    "as it stands": "{{ m.content }}",
    "trimmed": "{{ m.content.strip() | trim }}",
    "put together": "{{ '<' + m.role ~ '>' + m.content }}",
    "a macro": "{% macro f(x) %}({{ x }}){% endmacro %}{{ f(m.content) | trim }}",
    "a block": "{% set x %}{{ m.content }}{% endset %}{{ x }}",
    "json": "{{ m | tojson }}{{ m.content | tojson }}",
    "arguments": "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{{ c.function.name }}{% endfor %}",
    "numbers": "{{ m.n }}",
    "numbers looked at": "{% if m.n is defined and m.n > -5 %}{{ m.n }}{% endif %}",
    "arguments looked at": "{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}{{ v }}{% endfor %}"
    "{% endfor %}",
    "arguments filtered": "{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}{{ v }}{% endfor %}"
    "{% endfor %}",
    "a day": "{{ strftime_now('%Y') }}{{ m.content }}",
    "generation": "{% generation %}{{ m.content }}{% endgeneration %}",
    "safe": "{{ m | tojson | safe }}",
}  # fmt: skip


@pytest.mark.parametrize(
    "look",
    [
        "'abc' | random", "[m.content] | random", "lipsum()", "cycler(1, 2).next()", "m | pprint", "m.items",
        "['a'] | map('upper')", "[messages | map(attribute='n')]", "loop", "namespace(a=1)",
    ],
)  # fmt: skip
def test_what_comes_by_chance_or_is_not_known_is_never_traced(look: str) -> None:
    template = TracedTemplate(FOR + f"{{{{ {look} }}}}" + END)
    for messages in rows(20):
        template.look(messages, {}).render(2, False, otherwise=lambda *_: "a")
    assert template.traces.made
    assert template.usable, "something was traced, and seen to be wrong"
    assert not any(template.traces.of.values())


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed_is_traced(name: str) -> None:
    count = 20 if name != "numbers looked at" else 60  # their values are of the shape then
    assert held(FOR + FOLLOWED[name] + END, count) > count / 2


def test_an_answer_that_differs_makes_another_trace() -> None:
    rest = "{{ m.content.split('</think>')[-1] }}"
    source = FOR + "{% if '</think>' in m.content %}" + rest + "{% else %}{{ m.content }}{% endif %}" + END
    template = TracedTemplate(source)
    used = []
    for text in ["a", "b", "c", "x</think>y", "z</think>w", "d", "1</think>2</think>3"]:
        messages = [{"role": "user", "content": text}]
        before = template.traces.used
        found = template.look(messages, {}).render(
            1, False, otherwise=lambda *_, m=messages: oracle(source, m, {}, False)
        )
        assert found == oracle(source, messages, {}, False)
        used.append(template.traces.used > before)
    assert used == [False, False, True, False, True, True, False]


def test_what_another_variable_would_change_is_another_shape() -> None:
    source = "{{ bos }}" + FOR + "{{ m.content }}{{ m.n }}" + END + "{{ tools | length if tools else 0 }}{{ flag }}"
    template = TracedTemplate(source)
    tools = [None, [], [{"a": 1}], [{"a": 1}, {"b": 2}]]
    shown = [
        {"bos": bos, "tools": some, "flag": flag}
        for bos, some, flag in itertools.product(["<s>", ""], tools, [1, True, 1.0, "1"])
    ] * 4
    for variables in shown:
        messages = [{"role": "user", "content": "x", "n": 1}]
        expected = oracle(source, messages, variables, False)
        assert template.look(messages, variables).render(1, False, otherwise=lambda *_, e=expected: e) == expected
    assert template.traces.used >= len(shown) // 4


def test_a_trace_that_gives_another_text_ends_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    template = TracedTemplate(FOR + "{{ m.content }}" + END)
    monkeypatch.setattr(traced.Trace, "text", lambda self, values: "wrong")
    for _ in range(3):
        look = template.look([{"role": "user", "content": "right"}], {})
        assert look.render(1, False, otherwise=lambda *_: "right") == "right"
    assert not template.usable


def test_the_day_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        year = 2026

        @classmethod
        def now(cls) -> datetime.datetime:
            return datetime.datetime(cls.year, 1, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    source = FOR + "{{ m.content }}" + END + "{{ strftime_now('%Y') }}"
    template = TracedTemplate(source)
    for Clock.year in (2026, 2026, 2026, 2027, 2028):
        messages = [{"role": "user", "content": "a"}]
        expected = oracle(source, messages, {}, False)
        assert expected == f"a{Clock.year}"
        assert template.look(messages, {}).render(1, False, otherwise=lambda *_, e=expected: e) == expected
    assert template.traces.used == 3


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "_SHAPES", 20)
    template = TracedTemplate(FOR + "{{ m | tojson }}" + END)
    for number in range(500):
        messages = [{"role": "user", f"key {number // 3}": "v"}]
        look = template.look(messages, {})
        text = oracle(FOR + "{{ m | tojson }}" + END, messages, {}, False)
        assert look.render(1, False, otherwise=lambda *_, t=text: t) == text
        assert len(template.traces.of) <= 22
    assert template.traces.used


def test_a_template_that_cannot_be_followed_is_not_tried_for_ever() -> None:
    template = TracedTemplate(FOR + "{{ m.content | wordwrap(3) }}" + END)
    for number in range(2 * traced._ASKED):
        messages = [{"role": "user", "content": str(number)}] * (1 + number % 4)
        template.look(messages, {}).render(1 + number % 4, False, otherwise=lambda *_: "x")
    assert template.traces.made == traced._TRIED
    assert template.traces.used == 0
    assert template.traces.asked == traced._ASKED


def test_shapes_that_seldom_come_again_are_not_traced_for_ever() -> None:
    source = FOR + "{{ m | tojson }}" + END
    template = TracedTemplate(source)
    for number in range(3 * traced._ASKED):
        messages = [{"role": "user", f"key {number if number % 30 else 0}": "v"}]
        text = oracle(source, messages, {}, False)
        assert template.look(messages, {}).render(1, False, otherwise=lambda *_, t=text: t) == text
    assert template.traces.asked == traced._ASKED
    assert template.traces.used > 10


def test_threads_share_traces() -> None:
    source = FOR + "{{ m.role }}{{ m.content | trim }}{% if 'a' in m.content %}!{% endif %}" + END
    template = TracedTemplate(source)
    wrong: list[Any] = []

    def work(offset: int) -> None:
        for number in range(300):
            text = TEXTS[(number + offset) % len(TEXTS)]
            messages = [{"role": "user", "content": text}, {"role": f"r{number % 7}", "content": text + "a"}]
            expected = oracle(source, messages, {}, False)
            if template.look(messages, {}).render(2, False, otherwise=lambda *_, e=expected: e) != expected:
                wrong.append(messages)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert template.usable
    assert template.traces.used > 600


# --- real templates and random ones -------------------------------------------------------------------------------------

REAL = ("system", "tools", "reasoning", "many_turns", "parallel_calls", "unicode")


def conversation(row: dict[str, Any], renderer: ChatRenderer) -> Conversation | None:
    try:
        read = parse_example(row, Reading())
    except MaskingError:
        return None
    return Forms(renderer).choose(read).of(read) if isinstance(read, Conversation) else None


def retold(value: Any, texts: Any, key: str = "") -> Any:
    """`value` with other texts of the conversation's own."""
    if isinstance(value, dict):
        return {name: retold(item, texts, name) for name, item in value.items()}
    if isinstance(value, list):
        return [retold(item, texts) for item in value]
    return next(texts) if isinstance(value, str) and key not in ("role", "type") else value


@pytest.mark.parametrize("name", template_names())
def test_real_templates_write_the_same_by_traces(name: str) -> None:
    renderer = ChatRenderer(tokenizer_for_template(name))
    texts = itertools.cycle(TEXTS)
    entries = [BY_NAME[key] for key in REAL if key in BY_NAME]
    for entry in entries * 2:
        told = conversation(entry.for_tokenizer("</s>"), renderer)
        if told is None:
            continue
        for messages in [told.messages, *(retold(told.messages, texts) for _ in range(4))]:
            render = renderer._beginnings(messages, told)
            for end, generation_prompt in itertools.product(range(1, len(messages) + 1), (False, True)):
                try:
                    plain = renderer._plainly(messages[:end], told, generation_prompt=generation_prompt)
                except MaskingError:
                    with pytest.raises(MaskingError):
                        render(end, generation_prompt)
                else:
                    assert render(end, generation_prompt) == plain
    quick = [quick for quick in renderer._quick.values() if quick]
    assert quick
    assert all(one._traced.usable for one in quick)
    assert sum(one._traced.traces.used for one in quick) > 20


@quiet(max_examples=60)
@given(
    knobs=templates(), texts=st.lists(st.lists(st.sampled_from(TEXTS), min_size=4, max_size=4), min_size=3, max_size=6)
)
def test_random_templates_write_the_same_by_traces(knobs: TemplateKnobs, texts: list[list[str]]) -> None:
    renderer = ChatRenderer(build_tokenizer("qwen", chat_template=None), knobs.jinja())
    for system, question, thought, answer in texts:
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "reasoning_content": thought},
        ]
        told = Conversation(messages, [False, False, True])
        render = renderer._beginnings(messages, told)
        for end, generation_prompt in itertools.product(range(1, 4), (False, True)):
            plain = renderer._plainly(messages[:end], told, generation_prompt=generation_prompt)
            assert render(end, generation_prompt) == plain
