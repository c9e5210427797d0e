"""What the data says about what is trained, in the spellings of the big trainers. A spelling is honoured or refused.

message   weight 0 | 1 (OpenAI)   train, training, trainable (Axolotl)   loss, loss_scale (ms-swift)   loss_mask
row       label, kto_tag: the answer is wanted or not (TRL, LLaMA-Factory, ms-swift)   chosen, rejected: preference data
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sft_plugins.masking.examples.values import ignoring, is_blank, schema_error

FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_scale", "loss_mask")
# Their documentation says that they have no meaning for messages of other roles.
_ASSISTANT_ONLY = ("loss", "loss_scale")
# Of these, some people's yes is other people's no, or they ask for parts of a turn.
AMBIGUOUS_FLAGS = ("mask", "masked", "training_detail", "train_detail", "reasoning_training_detail")
VERDICTS = ("label", "kto_tag")
PREFERENCES = (
    "chosen", "rejected", "chosen_messages", "rejected_messages", "chosen_response", "rejected_response",
    "rejected_tools",
)  # fmt: skip
# Columns of one number per token, or of one for the row.
TOKEN_WEIGHTS = ("loss_weights", "token_weights", "response_mask", "prompt_mask", "action_mask", "sample_weight")
_SAYING = frozenset({*VERDICTS, *PREFERENCES, *FLAGS, *AMBIGUOUS_FLAGS, *TOKEN_WEIGHTS})


def train_flag(message: Mapping[str, Any], where: str, *, role: str) -> bool | None:
    """Whether the message says that it carries loss; None where it does not say.

    Raises:
        MaskingError: `bad_schema` for other values, spellings that contradict each other, and loss on other roles.
    """
    said: dict[str, bool] = {}
    for key in FLAGS:
        value = message.get(key)
        if value is None:
            continue
        said[key] = _flag(key, value, where)
    for key in AMBIGUOUS_FLAGS:
        if key in message and not is_blank(message[key]):
            raise schema_error(
                f"{where} has `{key}`={message[key]!r}, which says what is trained in more than one way.",
                f"Write `train`: true or false for the message, or name the key in {ignoring(key)}.",
            )
    if len(set(said.values())) > 1:
        raise schema_error(f"{where} contradicts itself: {said}.", "Keep one of these keys.")
    wanted = [key for key, flag in said.items() if flag and key not in _ASSISTANT_ONLY]
    if wanted and role != "assistant":
        raise schema_error(
            f"{where} has `{wanted[0]}`={message[wanted[0]]!r}, but only assistant turns carry loss.",
            f"Remove it there, or name it in {ignoring(wanted[0])} to train all assistant turns.",
        )
    return next(iter(said.values()), None)


def check_row_flags(row: Mapping[str, Any]) -> None:
    """Raises:
    MaskingError: `bad_schema` for a row that says, in a column of its own, that it is not to be trained as it stands.
    """
    if _SAYING.isdisjoint(row):
        return
    for key in VERDICTS:
        value = row.get(key)
        if value is None or _is_yes(value):
            continue
        raise schema_error(
            f"the row has `{key}`={value!r}, as preference data (KTO) marks an answer that is not wanted.",
            f"Keep the rows whose {key} is true, or name it in {ignoring(key)} to train on all of them.",
        )
    if found := _filled(row, PREFERENCES):
        raise schema_error(
            f"the row has `{found[0]}` beside its conversation, as preference data does: two answers, of which one is wanted.",
            f"Give the wanted answer as `messages` or `completion`, and name the others in {ignoring(*found)}.",
        )
    for key in (*FLAGS, *AMBIGUOUS_FLAGS, *TOKEN_WEIGHTS):
        value = row.get(key)
        if value is None or (key not in AMBIGUOUS_FLAGS and _is_yes(value)) or is_blank(value):
            continue
        raise schema_error(
            f"the row has `{key}`={str(value)[:60]}, which would decide what is trained.",
            "Say it per message (`train`: false), with `labels`, `completion_mask` or `assistant_masks` for tokenised rows, or "
            f"name it in {ignoring(key)}.",
        )


def _flag(key: str, value: Any, where: str) -> bool:
    # A bool is a number to Python, and people write both; text is neither.
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise schema_error(
        f"{where} has `{key}`={value!r}; allowed: false or true, 0 or 1.",
        "Fractional weights are not supported: a token either carries loss or does not.",
    )


def _is_yes(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1")
    return isinstance(value, (bool, int, float)) and value == 1


def _filled(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [name for name in names if name in row and not is_blank(row[name])]
