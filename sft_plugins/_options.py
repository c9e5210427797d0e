"""Values that an option may have, said once: functions, commands and configuration files read these same types."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

TrainOn: TypeAlias = Literal["all", "last"]
Errors: TypeAlias = Literal["raise", "drop"]
HistoryRewrite: TypeAlias = Literal["split", "raise"]
SpecialTokens: TypeAlias = Literal["raise", "allow"]
Thinking: TypeAlias = Literal["auto", "default"]
Reasoning: TypeAlias = Literal["raise", "inline", "drop"]
Overflow: TypeAlias = Literal["raise", "drop", "truncate", "keep_turns"]


def words(kind: Any) -> tuple[str, ...]:
    """The words that an option of type `kind` may be; empty for any other type."""
    allowed = get_args(kind)
    return allowed if all(isinstance(word, str) for word in allowed) else ()
