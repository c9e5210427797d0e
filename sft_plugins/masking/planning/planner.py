"""A conversation → its turns, in the form its template takes, and shown to hold all of the data.

    checked  →  a pattern of its shape                           →  turns
             →  form  →  modes, prompts, responses  →  coverage  ↗

By either way the turns are the same.
"""

from __future__ import annotations

from sft_plugins.errors import MaskingError
from sft_plugins.masking.coverage.forms import Forms
from sft_plugins.masking.coverage.whole import Coverage
from sft_plugins.masking.examples.formats import Conversation
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.planning.patterns import Patterns
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.turns.modes import Modes
from sft_plugins.masking.turns.stop_tokens import StopTokens
from sft_plugins.masking.turns.tokenizer import TextTokenizer
from sft_plugins.masking.turns.turns import Turn, plan_turns, supervised_turns


class Planner:
    """Plans conversations for one tokenizer and its templates.

    Attributes:
        forms: chooses the form in which a template takes a conversation.
    """

    def __init__(
        self, renderer: ChatRenderer, modes: Modes, text: TextTokenizer, known: StopTokens, options: MaskingOptions
    ) -> None:
        self._renderer, self._modes, self._text, self._known, self._options = renderer, modes, text, known, options
        self.forms, self._coverage = Forms(renderer), Coverage(renderer)
        self._patterns = Patterns(renderer, modes, tuple(text.decode([token]) for token in known.ids))

    def plan(self, conversation: Conversation) -> list[Turn]:
        """The supervised turns of `conversation`, in order.

        Raises:
            MaskingError: `bad_schema` without a chat template, `no_supervised_tokens`, `empty_response`, `no_prompt`,
                `special_token_in_content`, `template_error`, `render_mismatch`, `content_lost`, `history_rewrite`.
        """
        if not self._renderer.available:
            raise MaskingError(
                "the row is a conversation, but the tokenizer has no chat template.",
                code="bad_schema",
                remedy="{set_chat_template:Pass `chat_template=…`}, or give the row as `prompt` and `response` strings.",
            )
        indices = supervised_turns(conversation, self._text, self._known, self._options)
        return self._patterns.turns(conversation, indices, lambda: self._anew(conversation, indices))

    def _anew(self, conversation: Conversation, indices: list[int]) -> list[Turn]:
        form = self.forms.choose(conversation)
        turns = plan_turns(form.of(conversation), indices, self._modes, self._text, self._known, self._options)
        self._coverage.check(turns)
        return [turn._replace(changes=turn.changes + form.changes) for turn in turns] if form.changes else turns
