"""Conversation → the texts of its supervised turns, before anything is tokenised.

    messages          u1  a1  u2  a2
    turn a1           prompt  "<u>u1</u><a>"                    response "a1</a>"
    turn a2           prompt  "<u>u1</u><a>a1</a><u>u2</u><a>"  response "a2</a>"   added "<u>u2</u><a>"

`added` is what a turn's prompt appends to the row so far; None where the prompt does not go on from it, because the template
renders the earlier turns differently once they are history. A new row begins there.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.examples.messages import Message, leaves, other_texts
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.turns.template import ChatRenderer
from sft_plugins.masking.turns.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Turn:
    """Texts of one supervised turn, `conversation.messages[index]`; see the module's first lines."""

    conversation: Conversation
    index: int
    prompt: str
    response: str
    added: str | None

    @property
    def message(self) -> Message:
        return self.conversation.messages[self.index]

    @property
    def where(self) -> str:
        return f"message {self.index} (assistant)"


def plan_turns(
    conversation: Conversation, renderer: ChatRenderer, text: TextTokenizer, options: MaskingOptions
) -> list[Turn]:
    """The supervised turns of `conversation`, in order.

    Raises:
        MaskingError: `bad_schema` without a chat template, `no_supervised_tokens`, `empty_response`, `no_prompt`,
            `special_token_in_content`, `template_error`, `render_mismatch`, `history_rewrite`.
    """
    if not renderer.available:
        raise MaskingError(
            "the row is a conversation, but the tokenizer has no chat template.",
            code="bad_schema",
            remedy="Pass `chat_template=…`, or give the row as `prompt` and `response` strings.",
        )
    indices = [index for index, trained in enumerate(conversation.trainable) if trained]
    if options.train_on == "last":
        indices = indices[-1:]
    _check_messages(conversation, indices, text, options)
    turns: list[Turn] = []
    before = None  # the text of the row so far, the last response and what the template adds after it included
    for index, prompt, full in renderer.turns(conversation, indices):
        if not full.startswith(prompt):
            raise _render_mismatch(index, prompt, full)
        added = prompt[len(before) :] if before is not None and prompt.startswith(before) else None
        if before is not None and added is None and options.on_history_rewrite == "raise":
            raise history_rewrite(index, "the template renders the turns before it differently once they are history")
        turns.append(Turn(conversation, index, prompt, full[len(prompt) :], added))
        before = full
    return turns


def history_rewrite(index: int, why: str) -> MaskingError:
    return MaskingError(
        f"message {index} cannot share a row with the turns before it: {why}.",
        code="history_rewrite",
        remedy='Use on_history_rewrite="split" (one exact row per such turn), or train_on="last".',
    )


def _check_messages(
    conversation: Conversation, indices: list[int], text: TextTokenizer, options: MaskingOptions
) -> None:
    messages = conversation.messages
    if not indices:
        raise MaskingError(
            "the conversation has no assistant message that carries loss.",
            code="no_supervised_tokens",
            remedy="Check roles, `weight` and `train`; such a row trains nothing.",
        )
    if indices[0] == 0:
        raise MaskingError(
            "the conversation begins with the assistant, so nothing prompts its first answer.",
            code="no_prompt",
            remedy='Give that message "train": false, or remove it.',
        )
    for index in indices:
        message = messages[index]
        if not message.get("tool_calls") and not conversation.texts[index].strip("\0 \t\r\n"):
            raise MaskingError(
                f"message {index} (assistant) is empty.",
                code="empty_response",
                remedy='Remove it, or give it "train": false; errors="drop" drops such rows and counts them.',
            )
    if options.special_tokens_in_content == "raise":
        places = [
            (f"message {index} ({message['role']})", [conversation.texts[index], *other_texts(message)])
            for index, message in enumerate(messages[: indices[-1] + 1])
        ]
        places += [("`tools`", leaves(conversation.tools))]
        places += [("`chat_template_kwargs`", leaves(conversation.template_kwargs))]
        for where, texts in places:
            found = text.find_special("\0".join(texts))
            if found is not None:
                raise special_token_error(found, where)


def special_token_error(found: str, where: str) -> MaskingError:
    return MaskingError(
        f"{where} holds the text of the special token {found!r}, which would be tokenised as that token.",
        code="special_token_in_content",
        remedy='Clean the data: such text can forge a turn. special_tokens_in_content="allow" trains it as it stands.',
    )


def _render_mismatch(index: int, prompt: str, full: str) -> MaskingError:
    same = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return MaskingError(
        f"the template renders message {index} (assistant) so that it does not begin with the prompt that generation "
        f"would be given: they part at character {same}, prompt {prompt[same : same + 40]!r}, "
        f"with the turn {full[same : same + 40]!r}.",
        code="render_mismatch",
        remedy="Pass the `chat_template_kwargs` that generation will use (enable_thinking, say), give the data the "
        "reasoning that the template expects, or pass a `chat_template` that renders both alike.",
    )
