"""What a `PromptMasker` is asked to do, validated once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_type_hints

from sft_plugins._options import Errors, HistoryRewrite, Overflow, SpecialTokens, TrainOn, words
from sft_plugins.errors import MaskingError


@dataclass(frozen=True, kw_only=True)
class MaskingOptions:
    """See `PromptMasker` for what each means.

    Raises:
        MaskingError: `bad_option` for a value that is not allowed, naming those that are.
    """

    train_on: TrainOn = "all"
    errors: Errors = "raise"
    on_history_rewrite: HistoryRewrite = "split"
    special_tokens_in_content: SpecialTokens = "raise"
    max_length: int | None = None
    overflow: Overflow = "raise"
    chat_template: str | None = None
    stop_token_ids: Iterable[int] | None = None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            allowed, value = words(hint), getattr(self, name)
            if allowed and value not in allowed:
                raise _bad(name, value, "one of " + ", ".join(map(repr, allowed)))
        length = self.max_length
        if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 2):
            raise _bad("max_length", length, "a whole number of at least 2, or None")
        if self.stop_token_ids is not None:
            try:
                object.__setattr__(self, "stop_token_ids", tuple(sorted(set(self.stop_token_ids))))
            except TypeError as error:
                raise _bad("stop_token_ids", self.stop_token_ids, "an iterable of token ids, or None") from error

    def drops(self, code: str) -> bool:
        """Whether a row that fails with `code` is dropped and counted, not raised."""
        return self.errors == "drop" or (code == "overflow" and self.overflow == "drop")


def _bad(name: str, value: Any, allowed: str) -> MaskingError:
    return MaskingError(f"{name}={value!r}; allowed: {allowed}.", code="bad_option", remedy=f"Correct `{name}`.")
