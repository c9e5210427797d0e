"""What a `PromptMasker` is asked to do, validated once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

from sft_plugins._options import (
    Errors,
    HistoryRewrite,
    Overflow,
    Reasoning,
    SpecialTokens,
    Thinking,
    TrainOn,
    bad_option,
    one_of,
    whole_number_or_none,
    words,
)
from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.roles import ALLOWED_TARGETS

_bad = partial(bad_option, error=MaskingError)


@dataclass(frozen=True, kw_only=True)
class MaskingOptions:
    """See `PromptMasker` for what each means.

    Raises:
        MaskingError: `bad_option` for a value that is not allowed, naming those that are.
    """

    train_on: TrainOn = "all"
    errors: Errors = "raise"
    on_history_rewrite: HistoryRewrite = "split"
    special_tokens_in_content: SpecialTokens | Iterable[str] = "raise"
    thinking: Thinking = "auto"
    reasoning: Reasoning = "raise"
    max_length: int | None = None
    overflow: Overflow = "raise"
    chat_template: str | None = None
    stop_token_ids: Any = None
    roles: Mapping[str, str] | None = None
    ignore_columns: Iterable[str] = ()

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            allowed, value = words(hint), getattr(self, name)
            if allowed:
                one_of(name, value, allowed, MaskingError)
        length = whole_number_or_none("max_length", self.max_length, MaskingError, least=2)
        object.__setattr__(self, "max_length", length)
        self._read_special_tokens()
        self._read_stop_tokens()
        self._read_names()

    def _read_special_tokens(self) -> None:
        given = self.special_tokens_in_content
        if isinstance(given, str) and given in words(SpecialTokens):
            return
        names = () if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable) else tuple(given)
        if not names or not all(isinstance(name, str) for name in names):
            allowed = ", ".join(map(repr, words(SpecialTokens)))
            raise _bad("special_tokens_in_content", given, f"one of {allowed}, or a list of special tokens")
        object.__setattr__(self, "special_tokens_in_content", tuple(sorted(set(names))))

    def _read_stop_tokens(self) -> None:
        given = self.stop_token_ids
        if given is None:
            return
        config = getattr(given, "generation_config", given)  # of a model
        if hasattr(config, "eos_token_id"):
            eos = config.eos_token_id
            given = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
        try:
            object.__setattr__(self, "stop_token_ids", tuple(sorted(set(given))))
        except TypeError as error:
            allowed = "an iterable of token ids, a model or its generation config, or None"
            raise _bad("stop_token_ids", self.stop_token_ids, allowed) from error

    def check_special_tokens(self, known: Collection[str]) -> None:
        """Raises:
        MaskingError: `bad_option` for a name among the allowed ones that is no special token of the tokenizer.
        """
        given = self.special_tokens_in_content
        unknown = [] if isinstance(given, str) else sorted(set(given) - set(known))
        if unknown:
            raise _bad(
                "special_tokens_in_content", unknown, "special tokens of this tokenizer, " + ", ".join(sorted(known))
            )

    def allows(self, special_token: str) -> bool:
        """Whether text of the data may turn into `special_token`."""
        allowed = self.special_tokens_in_content
        return allowed == "allow" or (allowed != "raise" and special_token in allowed)

    def _read_names(self) -> None:
        roles, columns = self.roles, self.ignore_columns
        if roles is not None and (
            not isinstance(roles, Mapping)
            or not all(isinstance(name, str) and role in ALLOWED_TARGETS for name, role in roles.items())
        ):
            raise _bad("roles", roles, f"a mapping of names to roles ({', '.join(ALLOWED_TARGETS)}), or None")
        if isinstance(columns, (str, Mapping)) or not isinstance(columns, Iterable):
            raise _bad("ignore_columns", columns, "a list of names of columns")
        names = tuple(columns)
        if not all(isinstance(name, str) for name in names):
            raise _bad("ignore_columns", columns, "a list of names of columns")
        object.__setattr__(self, "roles", None if roles is None else dict(roles))
        object.__setattr__(self, "ignore_columns", tuple(sorted(set(names))))

    def drops(self, code: str) -> bool:
        """Whether a row that fails with `code` is dropped and counted, not raised."""
        return self.errors == "drop" or (code == "overflow" and self.overflow == "drop")
