"""The modes of a chat template: the generation prompts that its own switches (`enable_thinking`, `thinking`) give.

    Nemotron-3   default                  "<|im_start|>assistant\\n<think>\\n"           tail of a prompt
                 enable_thinking=False    "<|im_start|>assistant\\n<think></think>"

A turn belongs to the mode whose prompt its rendering goes on from; of several, to the one that supplies most of the turn. A
prompt that opens a thought is for turns with reasoning, one that closes it for turns without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import nodes

from sft_plugins.errors import MaskingError
from sft_plugins.masking.coverage.own_part import own_part
from sft_plugins.masking.coverage.planting import plant
from sft_plugins.masking.coverage.skeleton import Skeleton
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import Message, reasoning_texts
from sft_plugins.masking.rendering.template import ChatRenderer, TurnText, parsed
from sft_plugins.masking.turns.reasoning import (
    continuation,
    first_difference,
    holds_reasoning,
    may_stand_elsewhere,
    reasons,
    thought_at_end,
)

SWITCH = re.compile(r"(enable_|use_|with_)?(think|thinking|reasoning)")
"""Names of the switches between modes."""
_CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
_QUESTION: list[Message] = [{"role": "user", "content": "Zquestionq"}]
_RESULT: list[Message] = [
    *_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "content": "Zresultq"},
]  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """Values of a template's switches, and what its generation prompt adds behind a question and behind a tool's result.

    `end_only`: the switches change nothing but that tail, whatever the conversation.
    """

    switches: Mapping[str, Any]
    tails: tuple[str, str]
    end_only: bool

    @cached_property
    def name(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.switches.items()) or "default"


class Modes:
    """Finds the modes of the templates at hand, once each, the default first."""

    def __init__(self, renderer: ChatRenderer, *, auto: bool = True) -> None:
        """`auto=False`: the default alone."""
        self.renderer, self._auto = renderer, auto
        self._found: dict[str, tuple[Mode, ...]] = {}

    def of(self, conversation: Conversation) -> tuple[Mode, ...]:
        """The modes that `conversation` may be rendered in: the user's own where the row sets a switch."""
        source = self.renderer.template_source(conversation.tools)
        if source not in self._found:
            self._found[source] = tuple(self._find(source))
        modes = self._found[source]
        if any(name in conversation.template_kwargs for mode in modes for name in mode.switches):
            return modes[:1]
        return modes

    def _find(self, source: str) -> Iterator[Mode]:
        default = self._prompts({})
        tails = (default[0][1], default[1][1])
        yield Mode({}, tails, end_only=True)
        if not self._auto or not tails[0]:
            return
        tree, variables, _ = parsed(source)
        seen = {tails}
        for name in sorted(filter(SWITCH.fullmatch, variables)):
            for value in (False, True):
                question, result = self._prompts({name: value})
                if question[1] and (question[1], result[1]) not in seen:
                    seen.add((question[1], result[1]))
                    same = question[0] == default[0][0]
                    yield Mode({name: value}, (question[1], result[1]), end_only=same and _read_at_the_end(tree, name))

    def _prompts(self, switches: dict[str, Any]) -> list[tuple[str, str]]:
        """A question, and a tool's result, each as rendered and with what a generation prompt adds; empty where not told."""
        return [self._prompt(messages, switches) for messages in (_QUESTION, _RESULT)]

    def _prompt(self, messages: list[Message], switches: dict[str, Any]) -> tuple[str, str]:
        in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        for form in (messages, in_parts):
            conversation = Conversation(form, [], template_kwargs=switches)
            try:
                without, prompt = (
                    self.renderer.render(form, conversation, generation_prompt=flag) for flag in (False, True)
                )
            except MaskingError:  # not in this form, or no such conversation
                continue
            if prompt.startswith(without):
                return without, prompt[len(without) :]
        return "", ""


def switched(conversation: Conversation, mode: Mode) -> Conversation:
    """`conversation` with the mode's switches set."""
    return replace(conversation, template_kwargs={**conversation.template_kwargs, **mode.switches})


class ModeTexts:
    """Texts of a conversation's supervised turns, in whichever mode they are asked for; rendered once per mode."""

    def __init__(self, renderer: ChatRenderer, conversation: Conversation, indices: list[int], default: Mode) -> None:
        self._renderer, self._indices, self._default = renderer, indices, default
        self._conversations: dict[str, Conversation] = {default.name: conversation}
        self._texts = {default.name: {text.at: text for text in renderer.turns(conversation, indices)}}

    def conversation(self, mode: Mode) -> Conversation:
        """The conversation with the mode's switches set."""
        if mode.name not in self._conversations:
            self._conversations[mode.name] = switched(self._conversations[self._default.name], mode)
        return self._conversations[mode.name]

    def text(self, mode: Mode, index: int) -> TurnText | None:
        """Texts of the turn at `index`; None where the template does not render the conversation in this mode."""
        if mode.name not in self._texts:
            self._texts[mode.name] = self._derived(mode) or self._rendered(mode)
        return self._texts[mode.name].get(index)

    def header(self, mode: Mode, index: int) -> int:
        """Length of the generation prompt proper: what it adds to the messages before the turn."""
        text = self.text(mode, index)
        conversation = self.conversation(mode)
        try:
            before = self._renderer.render(conversation.messages[:index], conversation, generation_prompt=False)
        except MaskingError:  # these messages alone the template refuses; then nothing says what is added to them
            return 0
        return 0 if text is None else len(text.prompt) - len(before)

    def own_part(self, mode: Mode, index: int) -> str | None:
        """What the template writes for the turn at `index`, wherever the history before it has been rewritten."""
        text = self.text(mode, index)
        return text and own_part(self._renderer, self.conversation(mode), index, text.prompt, text.full)

    def renders_reasoning(self, mode: Mode, index: int) -> bool:
        """Whether the template writes the reasoning of the turn at `index`, shown with marks in place of all texts."""
        planted = plant(self.conversation(mode), index + 1)
        wanted = {n for n, slot in enumerate(planted.slots) if slot.owner == index and slot.what == "reasoning"}
        try:
            marked = self._renderer.render(planted.conversation.messages, planted.conversation, generation_prompt=False)
        except MaskingError:  # the template looks at texts, and refuses the marks
            return True
        return wanted <= set(Skeleton.of(marked).order)

    def _derived(self, mode: Mode) -> dict[int, TurnText]:
        tail, texts = self._default.tails[0], self._texts[self._default.name]
        if not (mode.end_only and tail and all(text.prompt.endswith(tail) for text in texts.values())):
            return {}
        return {at: TurnText(at, prompt[: -len(tail)] + mode.tails[0], full) for at, prompt, full in texts.values()}

    def _rendered(self, mode: Mode) -> dict[int, TurnText]:
        try:
            texts = self._renderer.turns(self.conversation(mode), self._indices)
        except MaskingError:
            return {}
        return {text.at: text for text in texts}


class Choice(NamedTuple):
    """A turn's mode and texts, before it is known whether it goes on from the row so far."""

    mode: Mode
    prompt: str
    response: str
    full: str
    changes: tuple[str, ...] = ()


def choose_mode(texts: ModeTexts, modes: tuple[Mode, ...], index: int) -> Choice | None:
    """The mode and the texts of the turn at `index`; None where no mode renders its reasoning.

    Raises:
        MaskingError: `render_mismatch`.
    """
    message = texts.conversation(modes[0]).messages[index]
    reasoned = reasons(message)
    wrong = "closed" if reasoned else "open"  # a prompt that is meant for another kind of turn comes last
    first: Choice | None = None
    found: list[Choice] = []
    rendered: list[tuple[Mode, TurnText]] = []
    for mode in modes:
        if found and found[0].mode is modes[0] and _supplies_no_more(texts, mode, modes[0], index, found[0], wrong):
            continue
        text = texts.text(mode, index)
        if text is None:
            continue
        rendered.append((mode, text))
        if text.full.startswith(text.prompt):
            choice = Choice(mode, text.prompt, text.full[len(text.prompt) :], text.full)
            first = first or choice
            if not reasoned or _holds_reasoning(texts, mode, index, choice.response):
                found.append(choice)
    if len(found) > 1:
        # Where the modes differ in their tails alone, their prompts are as much longer as their headers are.
        alike = all(one.mode.end_only for one in found)
        header = {one.mode.name: len(one.prompt) if alike else texts.header(one.mode, index) for one in found}
        found.sort(key=lambda one: (thought_at_end(one.prompt) == wrong, -header[one.mode.name]))
    if found:
        return found[0]
    rendered.sort(key=lambda one: thought_at_end(one[1].prompt) == wrong)
    for mode, (_, prompt, full) in rendered:
        own = continuation(prompt, full, message)
        if own is not None and (thought_at_end(prompt) != "none" or not reasoning_texts(message)):
            return Choice(mode, prompt, own, prompt + own, ("continued",))
    if first is None:
        ours = [_behind_its_header(texts, mode, index, wrong) for mode, _ in rendered]
        if told := [choice for choice in ours if choice is not None]:
            return max(told, key=lambda choice: texts.header(choice.mode, index))
    if first is not None:  # what is lost of a thought in tags is told where the whole turn is looked at
        return None if reasoning_texts(message) else first
    default = next(text for mode, text in rendered if mode is modes[0])
    raise _render_mismatch(default.prompt, default.full, message, index)


def _holds_reasoning(texts: ModeTexts, mode: Mode, index: int, response: str) -> bool:
    """Whether the response holds the turn's reasoning: by its text, or by its place where the text may stand elsewhere."""
    message = texts.conversation(mode).messages[index]
    return holds_reasoning(response, message) and (
        not may_stand_elsewhere(message) or texts.renders_reasoning(mode, index)
    )


def _behind_its_header(texts: ModeTexts, mode: Mode, index: int, wrong: str) -> Choice | None:
    """The turn in `mode` where the template renders the history before it otherwise than the prompt does."""
    text = texts.text(mode, index)
    if text is None or thought_at_end(text.prompt) == wrong:
        return None
    own = texts.own_part(mode, index)
    message = texts.conversation(mode).messages[index]
    if own is None or (reasons(message) and not texts.renders_reasoning(mode, index)):
        return None
    return Choice(mode, text.prompt, own, text.prompt + own, ("continued",))


def _supplies_no_more(texts: ModeTexts, mode: Mode, default: Mode, index: int, going: Choice, wrong: str) -> bool:
    """Whether `mode` cannot win over the default, which goes on: its prompt is no longer, and the default's is no wrong one."""
    if thought_at_end(going.prompt) == wrong:
        return False
    after_tool = texts.conversation(default).messages[index - 1]["role"] == "tool"
    own, other = mode.tails[after_tool], default.tails[after_tool]
    return len(own) <= len(other) or thought_at_end(own) == wrong


def _read_at_the_end(tree: nodes.Template, name: str) -> bool:
    """Whether `name` is read only in a last block `{% if add_generation_prompt %}` that reads nothing else."""
    last = tree.body[-1]
    if not (isinstance(last, nodes.If) and isinstance(last.test, nodes.Name) and not last.elif_ and not last.else_):
        return False
    if last.test.name != "add_generation_prompt":
        return False
    inside = [found.name for node in last.body for found in (*_own(node), *node.find_all(nodes.Name))]
    everywhere = [found.name for found in tree.find_all(nodes.Name)]
    return set(inside) == {name} and inside.count(name) == everywhere.count(name)


def _own(node: nodes.Node) -> list[nodes.Name]:
    return [node] if isinstance(node, nodes.Name) else []


def _render_mismatch(prompt: str, full: str, message: Message, index: int) -> MaskingError:
    if thought_at_end(prompt) == "open" and not reasons(message):
        return MaskingError(
            f"the generation prompt opens a thought ({prompt[-20:]!r}), and message {index} (assistant) has no reasoning: "
            "to close the thought at once is to teach the model not to think.",
            code="render_mismatch",
            remedy="Give the message the reasoning that it lacks (`reasoning_content`), or "
            "{a_chat_template:pass a `chat_template`} whose generation prompt opens none.",
        )
    same = first_difference(prompt, full)
    return MaskingError(
        f"the template renders message {index} (assistant) so that it does not begin with the prompt that generation "
        f"would be given: they part at character {same}, prompt {prompt[same : same + 40]!r}, "
        f"with the turn {full[same : same + 40]!r}.",
        code="render_mismatch",
        remedy="{chat_template_kwargs:Pass the `chat_template_kwargs`} that generation will use (enable_thinking, say), "
        "give the data the reasoning that the template expects, or "
        "{a_chat_template:pass a `chat_template`} that renders both alike.",
    )
