"""`PromptMasker`: a row of data → masked rows, with loss on exactly the response tokens.

    parse_example  →  Conversation | TextPair  →  turns: texts, ids  →  labels: MaskedExample  →  overflow
                      Tokenized                →  checked, passed on as a MaskedExample        ↗

Prompt and response are tokenised apart, as generation sees them; all texts of a batch go through the tokenizer together.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

from sft_plugins._options import Errors, HistoryRewrite, Overflow, Reasoning, SpecialTokens, Thinking, TrainOn
from sft_plugins.errors import MaskingError
from sft_plugins.masking.checks import RowRules, batch_is_clean, find_violation
from sft_plugins.masking.encoding.ahead import encoded_ahead
from sft_plugins.masking.encoding.fast import EncoderDiffersError
from sft_plugins.masking.encoding.garbage import no_search_for_cycles
from sft_plugins.masking.examples.columns import Reading, unread_switches
from sft_plugins.masking.examples.formats import Conversation, TextPair, parse_example
from sft_plugins.masking.examples.messages import unread_keys
from sft_plugins.masking.examples.values import too_deep
from sft_plugins.masking.headers.assistant import check_every_turn_supervised
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.planning.planner import Planner
from sft_plugins.masking.rendering.template import ChatRenderer
from sft_plugins.masking.turns.ids import Cuts, TurnIds, cut_turns, turn_ids
from sft_plugins.masking.turns.labels import Assembler, Row
from sft_plugins.masking.turns.masked import MaskedExample
from sft_plugins.masking.turns.modes import Modes
from sft_plugins.masking.turns.overflow import fit
from sft_plugins.masking.turns.stop_tokens import find_stop_tokens
from sft_plugins.masking.turns.tokenizer import TextTokenizer, state_of
from sft_plugins.masking.turns.turns import Turn, plan_pair

logger = logging.getLogger(__name__)

_CHARACTERS = 1 << 14
_FEW = 16  # rows for which no thread is worth starting


@dataclass(frozen=True)
class Outcome:
    """What became of one row of data: the rows made of it and the errors that kept others from being made.

    Attributes:
        too_long: whether `max_length` alone is behind the errors; without it the row would be exact.
    """

    rows: list[MaskedExample]
    errors: list[MaskingError]
    too_long: bool = False


class _Planned(NamedTuple):
    """Some rows of data before their texts are ids: for each its turns or what became of it, and the texts of all turns."""

    plans: list[list[Turn] | Outcome]
    cuts: Cuts


class PromptMasker:
    """Masks prompts strictly: a row it returns is exact, and a row that cannot be exact is an error.

    Args:
        tokenizer: a transformers tokenizer, fast or slow. It is never changed here; tokens and templates that it is given
            later count from the next batch on.
        train_on: `"all"` assistant turns of a conversation, or the `"last"` one only.
        errors: `"raise"`, or `"drop"` rows that cannot be masked exactly; `mask_dataset` counts them by code.
        on_history_rewrite: where a template renders a turn differently once it is history, `"split"` the conversation
            into rows that are each exact, or `"raise"`.
        special_tokens_in_content: `"raise"`, `"allow"` text of the data to turn into special tokens, or a list of the tokens
            that may (ordinary words, `"<filename>"`).
        thinking: `"auto"`: where the template's switches (`enable_thinking`, …) give several generation prompts, each turn has
            the one that its rendering goes on from; `"default"`: that without switches. Switches in a row decide alone.
        reasoning: what becomes of reasoning that the template does not know: `"raise"`, `"inline"` it in front of the answer
            in `<think>` tags, or `"drop"` it, counted.
        max_length: most tokens a row may have; None for no limit.
        overflow: what becomes of longer rows: `"raise"`, `"drop"`, `"truncate"` (a cut turn gets no stop token), or
            `"keep_turns"` (the leading turns that fit).
        chat_template: used in place of the tokenizer's own.
        stop_token_ids: ids that stop generation, or a model or generation config that says so. Default: the tokenizer's EOS,
            the EOS ids of the generation config beside it (in its folder, or in the hub's cache), and the template's end of
            turn.
        roles: what further names of speakers mean, as `{"critic": "user"}`; a known name may be given another role.
        ignore_columns: columns of rows, and keys of messages, that are not looked at.

    Raises:
        MaskingError: with a stable `code`: `bad_option` here; see `encode` for rows.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        train_on: TrainOn = "all",
        errors: Errors = "raise",
        on_history_rewrite: HistoryRewrite = "split",
        special_tokens_in_content: SpecialTokens | Iterable[str] = "raise",
        thinking: Thinking = "auto",
        reasoning: Reasoning = "raise",
        max_length: int | None = None,
        overflow: Overflow = "raise",
        chat_template: str | None = None,
        stop_token_ids: Any = None,
        roles: Mapping[str, str] | None = None,
        ignore_columns: Iterable[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.options = MaskingOptions(
            train_on=train_on,
            errors=errors,
            on_history_rewrite=on_history_rewrite,
            special_tokens_in_content=special_tokens_in_content,
            thinking=thinking,
            reasoning=reasoning,
            max_length=max_length,
            overflow=overflow,
            chat_template=chat_template,
            stop_token_ids=stop_token_ids,
            roles=roles,
            ignore_columns=ignore_columns,
        )
        self._prepare()

    def _prepare(self) -> None:
        """All that is found out once about the tokenizer and its templates, as they are now."""
        self._text = TextTokenizer(self.tokenizer)
        state = state_of(self.tokenizer)
        self._renderer = ChatRenderer(self.tokenizer, self.options.chat_template)
        self.options.check_special_tokens(self._text.special)
        modes = Modes(self._renderer, auto=self.options.thinking == "auto")
        self._known = find_stop_tokens(self._text, self._renderer, self.options.stop_token_ids)
        self._assembler = Assembler(self._text, self._known, self.options)
        self._planner = Planner(self._renderer, modes, self._text, self._known, self.options)
        self._reading = Reading(
            has_chat_template=self._renderer.available,
            roles=self.options.roles or {},
            ignore_columns=frozenset(self.options.ignore_columns),
            variables=self._renderer.variables,
            names=self._renderer.names,
        )
        self._rules = RowRules(
            vocabulary_size=self._text.size,
            bos_token_id=self.tokenizer.bos_token_id,
            stop_token_ids=self._known.ids,
        )
        self._state = state  # last of all: what raised is raised again

    def _keep_up(self) -> None:
        """Prepare anew where the tokenizer has been given tokens or a template since."""
        if self._state != state_of(self.tokenizer):
            against = self._text.batch and self._text.batch.against
            self._prepare()
            if against:
                self.encode_slowly(against)

    # Compiled templates and piece tables do not travel; they are rebuilt on arrival (DataLoader workers, `num_proc`).
    def __getstate__(self) -> dict[str, Any]:
        against = self._text.batch and self._text.batch.against
        return {"tokenizer": self.tokenizer, "options": asdict(self.options), "against": against}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"], **state["options"])  # type: ignore[misc]
        if against := state.get("against"):  # what 0.1.0 pickled has no such word
            self.encode_slowly(against)

    def encode(self, example: Mapping[str, Any]) -> list[MaskedExample]:
        """Mask one row. Several rows come back where its history is split, none where it was dropped.

        Raises:
            MaskingError: where the row cannot be masked exactly: `bad_schema`, `template_error`, `render_mismatch`,
                `history_rewrite`, `no_prompt`, `empty_response`, `content_lost`, `boundary`, `missing_stop`,
                `special_token_in_content`, `double_bos`, `no_supervised_tokens`, `overflow`, and for rows already
                tokenised also `length_mismatch`, `id_out_of_range`, `label_mismatch`, `first_label`,
                `unsupervised_turn`, `already_packed`.
        """
        (outcome,) = self.encode_batch([example])
        for error in outcome.errors:
            if not self.options.drops(error.code):
                raise error
        return outcome.rows

    def encode_batch(self, examples: Iterable[Mapping[str, Any]]) -> list[Outcome]:
        """An `Outcome` per row of data; nothing is raised. All texts go through the tokenizer together."""
        examples = list(examples)
        try:
            return self.encode_batch_or_stop(examples)
        except EncoderDiffersError as error:
            logger.warning("fastokens is not used any more: %s; batches before this one may hold such ids", error)
            self.encode_slowly(str(error))
            return self.encode_batch_or_stop(examples)

    def encode_slowly(self, why: str) -> None:
        """Encode with the tokenizer itself from here on, and say why in the report."""
        if self._text.batch is not None:
            self._text.batch.turn_off(why)

    def encode_batch_or_stop(self, examples: Iterable[Mapping[str, Any]]) -> list[Outcome]:
        """`encode_batch` for callers that can begin anew.

        Raises:
            EncoderDiffersError: batches before this one may hold other ids than the tokenizer's; see `encoding/fast.py`.
        """
        self._keep_up()
        with no_search_for_cycles():
            made: list[Outcome] = []
            for planned, made_ids in self._with_ids(list(examples)):
                ids = iter(made_ids)
                assembled = [
                    self._assembled(plan, next(ids)) if isinstance(plan, list) else plan for plan in planned.plans
                ]
                made += self._masked(assembled)
            return [self._fitted(outcome) for outcome in self._checked(made)]

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The ids that stop generation."""
        self._keep_up()
        return self._known.ids

    @property
    def stop_token_names(self) -> dict[int, str]:
        """The text of each of them, for reports."""
        return {token: self._text.decode([token]) for token in self.stop_token_ids}

    @property
    def reading(self) -> Reading:
        """How rows are read under this template."""
        self._keep_up()
        return self._reading

    @property
    def notes(self) -> list[str]:
        """What a report says of this tokenizer and template, whatever the rows."""
        self._keep_up()
        names = " and ".join(repr(self._text.decode([token])) for token in self._known.unconfirmed)
        against = self._text.batch and self._text.batch.against
        slow = [f"the tokenizer itself made the ids, not the quicker fastokens: {against}"] if against else []
        if not names:
            return slow
        return [
            *slow,
            f"{names} ends turns in the chat template, but neither the tokenizer's EOS nor a generation config names it: "
            f"generation does not stop there by itself. Put {list(self._known.unconfirmed)} into `eos_token_id` of the model's "
            "generation config (or make it the tokenizer's EOS).",
        ]

    def encode_prompt(self, example: Mapping[str, Any]) -> list[int]:
        """Ids that generation is given for `example`: `messages` that end before the answer, with `tools` and
        `chat_template_kwargs` where there are any; or, without a chat template, the text of its `prompt`.

        Raises:
            MaskingError: `bad_schema`, `template_error`, as for a row with its answer.
        """
        self._keep_up()
        if "messages" not in example:
            return self._text.encode_prompt(example["prompt"])
        parsed = parse_example(example, self._reading)
        assert isinstance(parsed, Conversation)
        conversation = self._planner.forms.choose(parsed).of(parsed)
        text = self._renderer.render(conversation.messages, conversation, generation_prompt=True)
        return self._text.encode([text])[0]

    def fingerprint(self) -> str:
        """Hash of all that decides the result: tokenizer, template, options and the version of this library."""
        from sft_plugins import __version__

        self._keep_up()
        tokenizer = self.tokenizer
        facts = [
            __version__,
            type(tokenizer).__name__,
            tokenizer.special_tokens_map,
            tokenizer.chat_template,  # all of them, where it has one for tools besides
            sorted(self.stop_token_ids),
            asdict(self.options),
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        digest.update(self._text.definition().encode())  # megabytes, which JSON would go through once more
        return digest.hexdigest()[:32]

    def _with_ids(self, examples: list[Mapping[str, Any]]) -> Iterator[tuple[_Planned, list[list[TurnIds]]]]:
        """Some rows at a time, with the ids of the turns that are planned for them."""
        planned, encode = self._planned(examples), lambda some: turn_ids(self._text, some.cuts)
        if len(examples) > _FEW and self._text.is_direct:
            return encoded_ahead(planned, encode)
        return ((some, encode(some)) for some in planned)

    def _planned(self, examples: list[Mapping[str, Any]]) -> Iterator[_Planned]:
        """Plans of all rows, some at a time: enough text for the tokenizer to be asked seldom, little enough to begin soon."""
        plans: list[list[Turn] | Outcome] = []
        characters = 0
        for number, example in enumerate(examples, 1):
            plan = self._plan(example)
            plans.append(plan)
            characters += len(plan[-1].prompt) + len(plan[-1].response) if isinstance(plan, list) else 0
            if characters > _CHARACTERS or number == len(examples):
                cuts = cut_turns(self._text, [plan for plan in plans if isinstance(plan, list)])
                self._text.expect(cuts.texts)
                yield _Planned(plans, cuts)
                plans, characters = [], 0

    def _plan(self, example: Mapping[str, Any]) -> list[Turn] | Outcome:
        """The turns of a row, or what became of it already: its ids are given, or it is refused."""
        try:
            parsed = parse_example(example, self._reading)
            if isinstance(parsed, Conversation):
                turns = self._planner.plan(parsed)
                unread = (
                    *unread_keys(parsed.messages, self._reading.names),
                    *unread_switches(parsed.template_kwargs, self._reading),
                )
                return [turns[0]._replace(unread=unread), *turns[1:]] if unread else turns
            if isinstance(parsed, TextPair):
                return plan_pair(parsed, self._text, self._known, self.options)
            if parsed.assistant_mask and self.options.train_on == "all":
                check_every_turn_supervised(parsed, self._text, self._renderer)
            return Outcome([MaskedExample(parsed.input_ids, parsed.labels)], [])
        except MaskingError as error:
            return Outcome([], [error])
        except RecursionError:
            return Outcome([], [too_deep("the row")])

    def _assembled(self, turns: list[Turn], ids: list[TurnIds]) -> list[Row] | Outcome:
        try:
            return list(self._assembler.rows(turns, ids))
        except MaskingError as error:
            return Outcome([], [error])

    def _masked(self, assembled: list[list[Row] | Outcome]) -> Iterator[Outcome]:
        masked = iter(self._assembler.masked([row for rows in assembled if isinstance(rows, list) for row in rows]))
        for rows in assembled:
            yield Outcome([*islice(masked, len(rows))], []) if isinstance(rows, list) else rows

    def _checked(self, outcomes: list[Outcome]) -> Iterator[Outcome]:
        """`outcomes`, with the violation in place of the rows where one of them breaks an invariant."""
        if batch_is_clean([row.arrays for one in outcomes for row in one.rows], self._rules):
            yield from outcomes
            return
        for outcome in outcomes:
            found = (find_violation(*row.arrays, self._rules) for row in outcome.rows)
            violation = next((violation for violation in found if violation is not None), None)
            yield outcome if violation is None else Outcome([], [violation])

    def _fitted(self, outcome: Outcome) -> Outcome:
        if outcome.errors:
            return outcome
        errors: list[MaskingError] = []
        kept = [fit(row, self.options, errors) for row in outcome.rows]
        return Outcome([row for row in kept if row is not None], errors, too_long=bool(errors))
