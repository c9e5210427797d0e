"""`QuickTemplate`: the text that `apply_chat_template` gives, or no text at all; and who asks it, and when."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.values import Written
from sft_plugins.masking.rendering.quick import EVERY, QuickConversation, QuickTemplate
from sft_plugins.masking.rendering.template import ChatRenderer
from testkit.renderings import counting_plain_ones
from testkit.tokenizers import build_tokenizer

ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": "q {0}"},
    {"role": "assistant", "content": " a ", "keys": "k"},
]
FOR = "{% for m in messages %}"
END = "{% endfor %}"
# What a look-up may meet: keys, keys that are methods too, methods of strings, the loop, namespaces, what the sandbox forbids.
LOOK_UPS = {
    "keys": FOR + "{{ m.role }}{{ m['content'] }}{{ m.missing }}{{ m.missing is defined }}" + END,
    "a method's name": FOR + "{{ m.keys is string }}{{ m.get('keys') }}{% for k in m.keys() %}{{ k }}{% endfor %}" + END,
    "items": FOR + "{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}" + END,
    "methods of strings": FOR + "{{ m.content.strip().upper().split(' ')|join('-') }}{{ m.content.startswith(' ') }}" + END,
    "format": FOR + "{{ m.content.format('x') }}" + END,
    "format of a namespace": "{% set ns = namespace(f='{0}'.format, n=0) %}{{ ns.f('x') }}{{ ns.n }}{{ ns.missing }}",
    "a namespace that counts": "{% set ns = namespace(n=0, s=none) %}" + FOR
    + "{% set ns.n = ns.n + 1 %}{% set ns.s = m.role %}" + END + "{{ ns.n }}{{ ns.s }}",
    "the loop": FOR + "{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}"
    "{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{{ loop.depth }}{{ loop.cycle('a', 'b') }}"
    "{{ loop.changed(m.role) }}" + END,
    "json": FOR + "{{ m | tojson }}" + END,
    "a type": FOR + "{{ m.__class__ }}{{ m.content.__class__ }}{{ loop.__class__ }}" + END,
    "a type's own": FOR + "{{ m.content.__class__.__mro__ }}" + END,
    "a change": FOR + "{{ m.update({'role': 'x'}) }}{{ m.role }}" + END,
    "variables": "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ thinking }}",
    "its own complaint": "{{ raise_exception('no') }}",
}  # fmt: skip


def texts(source: str, messages: list[Any], **kwargs: Any) -> tuple[Any, Any]:
    """What the quick way gives for a prompt, and what the plain one gives or complains of."""
    renderer = ChatRenderer(build_tokenizer("qwen"), source)
    conversation = Conversation(messages, [], template_kwargs=kwargs)
    shown = QuickTemplate(source).look(messages, renderer._variables(conversation))
    found = shown.render(len(messages), True) if shown else None
    try:
        return found, renderer._plainly(messages, conversation, generation_prompt=True)
    except MaskingError:
        return found, None


@pytest.mark.parametrize("name", LOOK_UPS)
def test_every_look_up_gives_what_the_sandbox_gives(name: str) -> None:
    found, plain = texts(LOOK_UPS[name], ASKED, thinking=False)
    assert found == plain
    assert (plain is None) == (name in ("a type's own", "a change", "its own complaint"))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "q", "name": None},
        {"role": "user", "content": "q", "at": datetime.date(2026, 11, 26)},
        {"role": "user", "content": ("q",)},
        {"role": "user", "content": "q", 1: "one"},
        type("Other", (dict,), {})(role="user", content="q"),
    ],
    ids=["null", "date", "tuple", "number for a key", "subclass"],
)
def test_values_that_transformers_replaces_are_left_to_it(message: Any) -> None:
    assert QuickTemplate("{{ messages }}").look([message], {}) is None


def test_mappings_read_from_json_text_are_shown_as_mappings() -> None:
    call = {"function": Written(name="f", arguments=Written(x=None))}
    found, plain = texts(LOOK_UPS["json"], [{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert found == plain
    assert '"arguments": {"x": null}' in plain


def asked(renderer: ChatRenderer, times: int = 1, **kwargs: Any) -> tuple[set[str], int]:
    """Texts that `render` gives, and how often the plain way was gone."""
    conversation = Conversation(ASKED, [], **kwargs)
    return counting_plain_ones(
        lambda: {renderer.render(ASKED, conversation, generation_prompt=False) for _ in range(times)}
    )


def test_the_first_rendering_and_one_in_a_while_are_held_to_the_plain_one() -> None:
    renderer = ChatRenderer(build_tokenizer("qwen"), LOOK_UPS["keys"])
    assert asked(renderer)[1] == 1
    assert asked(renderer, EVERY - 1)[1] == 0
    assert asked(renderer)[1] == 1


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_template_that_is_rendered_otherwise_goes_the_plain_way_for_good(
    from_the_start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = ChatRenderer(build_tokenizer("qwen"), LOOK_UPS["keys"])
    (right,), _ = asked(renderer, 1 if from_the_start else EVERY)
    if from_the_start:
        renderer._quick.clear()
    own = QuickConversation.render
    monkeypatch.setattr(QuickConversation, "render", lambda self, *asked: (own(self, *asked) or "") + "!")
    made, calls = asked(renderer, 3)
    assert made == {right}
    assert calls == 3


def test_a_tokenizer_with_a_way_of_its_own_is_asked_each_time() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            return "own"

        def get_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("it has no template")

    own = Own(tokenizer_object=build_tokenizer("qwen").backend_tokenizer)
    assert asked(ChatRenderer(own, LOOK_UPS["keys"]), 2) == ({"own"}, 2)
    set_on_it = build_tokenizer("qwen")
    renderer = ChatRenderer(set_on_it, LOOK_UPS["keys"])
    assert asked(renderer, 2)[1] == 1
    set_on_it.apply_chat_template = own.apply_chat_template  # later than the renderer was made
    assert asked(renderer, 2) == ({"own"}, 2)


@pytest.mark.parametrize(
    "kwargs",
    [{"template_kwargs": {"documents": [{"title": "d"}]}}, {"template_kwargs": {"padding": False}}],
    ids=["documents", "an argument"],
)
def test_arguments_of_the_plain_way_are_left_to_it(kwargs: Any) -> None:
    renderer = ChatRenderer(build_tokenizer("qwen"), LOOK_UPS["keys"])
    asked(renderer)
    assert asked(renderer, 2, **kwargs)[1] == 2
