"""What a template writes for a turn where it renders the history before it otherwise than the generation prompt does.

    prompt     "<u>hi</u><a><think></think>one</a><a>"
    rendered   "<u>hi</u><a>one</a><a>two</a>"             the turn's own part: "two</a>"

The part stands behind the last text of another message, by position: after the generation prompt's header; or, where an answer
or a tool's result went before and the template goes on in one turn without a header, from the message's own text on.
"""

from __future__ import annotations

from sft_plugins.errors import MaskingError
from sft_plugins.masking.coverage.planting import plant
from sft_plugins.masking.coverage.skeleton import Skeleton
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.rendering.template import ChatRenderer


def own_part(renderer: ChatRenderer, conversation: Conversation, index: int, prompt: str, full: str) -> str | None:
    """The part of the rendering `full` that belongs to the message at `index`; None where it cannot be told."""
    planted = plant(conversation, index + 1)
    try:
        history = renderer.render(conversation.messages[:index], conversation, generation_prompt=False)
        marked = renderer.render(planted.conversation.messages, planted.conversation, generation_prompt=False)
    except MaskingError:  # the template refuses the marks, or these messages alone
        return None
    spans = Skeleton.of(marked).match(full, planted.slots)
    if spans is None:
        return None
    own = [span for span in spans if planted.slots[span.slot].owner == index]
    if not own:
        return None
    start = min(span.start for span in own)
    earlier = max((span.end for span in spans if span.end <= start), default=0)
    between = full[earlier:start]
    header = prompt[len(history) :] if prompt.startswith(history) else ""
    if header and header in between:
        return full[earlier + between.rindex(header) + len(header) :]
    if conversation.messages[index - 1]["role"] not in ("assistant", "tool"):
        return None
    if not conversation.messages[index].get("tool_calls"):
        goes_on = full.startswith(history) and not full[len(history) : start].strip()
        return full[start:] if goes_on or not between.strip() else None
    opening = full[len(history) : start] if full.startswith(history) else ""
    return full[len(history) :] if opening and opening == _opening(renderer, conversation, index) else None


def _opening(renderer: ChatRenderer, conversation: Conversation, index: int) -> str:
    """What the template writes in front of the call's name where the message answers the last question itself."""
    asked = max((at + 1 for at in range(index) if conversation.messages[at]["role"] == "user"), default=0)
    call = conversation.messages[index]
    try:
        prompt = renderer.render(conversation.messages[:asked], conversation, generation_prompt=True)
        full = renderer.render([*conversation.messages[:asked], call], conversation, generation_prompt=False)
    except MaskingError:  # no such conversation in this template
        return ""
    name = call["tool_calls"][0]["function"]["name"]
    return full[len(prompt) :].partition(name)[0] if full.startswith(prompt) else ""
