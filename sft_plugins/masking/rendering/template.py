"""Chat templates → for every supervised turn, the text generation would be given and the text with the turn in it.

    prompt_k = render(messages[:k], add_generation_prompt=True)        full_k = render(messages[:k + 1])

Done plainly that renders a conversation of n turns 2n times. `prefixes.py` proves, conversation by conversation, for which
prefixes one rendering gives them all; the others are rendered one by one, as `quick.py` does it. The results are the same
strings.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

from jinja2 import meta, nodes
from transformers.utils import chat_template_utils

from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import Message
from sft_plugins.masking.rendering.environment import PLAIN
from sft_plugins.masking.rendering.prefixes import WatchedTemplate
from sft_plugins.masking.rendering.quick import EVERY, TAKEN, QuickConversation, QuickTemplate, has_plain_way


class TurnText(NamedTuple):
    """Texts of the supervised turn at `messages[at]`."""

    at: int
    prompt: str
    full: str


class Parsed(NamedTuple):
    """A template's syntax tree, to be looked at only.

    Attributes:
        variables: names that it reads and does not set itself.
        names: whatever it could look up in a message: its attributes and its texts.
    """

    tree: nodes.Template
    variables: frozenset[str]
    names: frozenset[str]


@lru_cache(maxsize=32)
def parsed(source: str) -> Parsed:
    """`source`, parsed once however many maskers are made for it."""
    tree = chat_template_utils._compile_jinja_template(source).environment.parse(source)
    texts = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    names = {*(node.attr for node in tree.find_all(nodes.Getattr)), *texts}
    return Parsed(tree, frozenset(meta.find_undeclared_variables(tree)), frozenset(names))


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, or with one given in its place, as it was when first asked."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._watched: dict[str, WatchedTemplate] = {}
        self._quick: dict[str, QuickTemplate] = {}
        self._tails: dict[tuple[str, str | None], str | None] = {}
        self._rendered, self._shortcuts = 0, True

    @property
    def available(self) -> bool:
        return bool(self.chat_template or self.tokenizer.chat_template)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the templates read and do not set themselves."""
        return frozenset().union(*(one.variables for one in self._parsed))

    @cached_property
    def names(self) -> frozenset[str]:
        """Whatever the templates could look up in a message."""
        return frozenset().union(*(one.names for one in self._parsed))

    @cached_property
    def _parsed(self) -> list[Parsed]:
        """All templates of the tokenizer; none that cannot be compiled, which is named when a row is rendered."""
        found = []
        own: list[list[Any] | None] = [None, [{}]]  # some tokenizers have a template of its own for tools
        for tools in own if self.available else ():
            with suppress(Exception):
                found.append(parsed(self.template_source(tools)))
        return found

    def template_source(self, tools: list[Any] | None = None) -> str:
        return self.tokenizer.get_chat_template(self.chat_template, tools)

    def render(self, messages: list[Message], conversation: Conversation, *, generation_prompt: bool) -> str:
        """`apply_chat_template(tokenize=False)`; whatever the template raises comes back with its context."""
        return self._beginnings(messages, conversation)(len(messages), generation_prompt)

    def _beginnings(self, messages: list[Message], conversation: Conversation) -> Callable[[int, bool], str]:
        """`render` of the first so many of `messages`, which are looked at once for all of them."""
        look = cache(lambda: self.look(messages, conversation))

        def render(end: int, generation_prompt: bool) -> str:
            shown = look()
            quick = None if shown is None else shown.quick
            found = shown.render(end, generation_prompt) if quick and shown and quick.usable else None
            if quick and found is not None and quick.renderings % EVERY != 1:
                return found
            plain = self._plainly(messages[:end], conversation, generation_prompt=generation_prompt)
            if quick and found is not None and found != plain:
                quick.usable = False
            return plain

        return render

    def look(self, messages: list[Message], conversation: Conversation) -> QuickConversation | None:
        """At `messages` as the template is shown them; None where only the plain way is known to render them."""
        if not (self._shortcuts and self._has_plain_way(conversation)):
            return None
        source = self.template_source(conversation.tools)
        if source not in self._quick:
            self._quick[source] = QuickTemplate(source)
        quick = self._quick[source]
        return quick.look(messages, self._variables(conversation)) if quick.usable else None

    def around(self, conversation: Conversation) -> tuple[str, str]:
        """The template, and all that it is shown besides the messages: equal where they are, of such that `is_simple`."""
        if conversation.template_kwargs or conversation.tools is not None:
            return self.template_source(conversation.tools), repr(self._variables(conversation))
        return self._around_most

    @cached_property
    def _around_most(self) -> tuple[str, str]:
        return self.template_source(), repr(self._variables(Conversation([], [])))

    def is_simple(self, conversation: Conversation) -> bool:
        """Whether there are no tools, and of switches none but strings, numbers and their like."""
        return not conversation.tools and all(type(value) in PLAIN for value in conversation.template_kwargs.values())

    def _has_plain_way(self, conversation: Conversation) -> bool:
        return (
            has_plain_way(self.tokenizer)
            and TAKEN.isdisjoint(conversation.template_kwargs)
            and all(isinstance(tool, dict) for tool in conversation.tools or ())
        )

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        """What a template can look up besides the messages."""
        special = self.tokenizer.special_tokens_map
        return {"documents": None, **special, **conversation.template_kwargs, "tools": conversation.tools}

    def _plainly(self, messages: list[Message], conversation: Conversation, *, generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools,
                chat_template=self.chat_template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **conversation.template_kwargs,
            )
        except Exception as error:  # templates and their filters raise anything
            roles = " → ".join(message["role"] for message in messages[:8]) + (" → …" if len(messages) > 8 else "")
            raise MaskingError(
                f"the chat template cannot render the first {len(messages)} messages ({roles}): "
                f"{type(error).__name__}: {error}",
                code="template_error",
                remedy="Change the row to what the template takes, or {another_chat_template:pass another `chat_template`}.",
            ) from error

    def turns(self, conversation: Conversation, indices: list[int], *, shortcut: bool = True) -> list[TurnText]:
        """Texts of the supervised turns at `indices` (ascending). `shortcut=False` renders every prefix plainly."""
        messages = conversation.messages
        last, shortcut = indices[-1], shortcut and self._shortcuts
        found = self._shortcut(conversation, last) if shortcut else None
        texts, tail = found or ({}, "")

        def plainly(end: int, generation_prompt: bool) -> str:
            return self._plainly(messages[:end], conversation, generation_prompt=generation_prompt)

        render = self._beginnings(messages[: last + 1], conversation) if shortcut else plainly
        prompts = {} if found else {last: render(last, True)}  # first of all: what it complains of is told

        def prompt(k: int) -> str:
            if k in texts:
                return texts[k] + tail
            return prompts.get(k) or render(k, True)

        def full(k: int) -> str:
            return texts[k + 1] if k + 1 in texts else render(k + 1, False)

        return [TurnText(k, prompt(k), full(k)) for k in indices]

    def writes(self, conversation: Conversation, text: TurnText) -> bool:
        """Whether `apply_chat_template` writes `text`; where it does not, no shortcut is taken from here on."""
        with suppress(MaskingError):  # then it writes nothing
            self._shortcuts = self._shortcuts and self.turns(conversation, [text.at], shortcut=False) == [text]
            return self._shortcuts
        self._shortcuts = False
        return False

    def _shortcut(self, conversation: Conversation, last: int) -> tuple[dict[int, str], str] | None:
        """Prefixes of `messages[:last + 1]` out of one rendering, and what a generation prompt adds to each."""
        source = self.template_source(conversation.tools)
        if source not in self._watched:
            self._watched[source] = WatchedTemplate(source)
        found = self._watched[source].prefixes(conversation.messages[: last + 1], self._variables(conversation))
        if found is None or last not in found.texts:
            return None
        self._rendered += 1
        history, key = found.texts[last], (source, found.tail_key)
        tail = self._tails.get(key) if found.tail_key is not None and self._rendered % EVERY else None
        if tail is None:
            # A row in a while is looked at plainly all the same, and each for whose tail nothing vouches.
            prompt = self._plainly(conversation.messages[:last], conversation, generation_prompt=True)
            full = self._plainly(conversation.messages[: last + 1], conversation, generation_prompt=False)
            if not prompt.startswith(history) or full != found.texts[last + 1]:
                return None
            tail = prompt[len(history) :]
            if self._tails.setdefault(key, tail) != tail:
                self._tails[key] = None  # no fixed text after all
        return found.texts, tail
