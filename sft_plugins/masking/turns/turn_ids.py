"""Texts of turns → ids, all texts of a batch in one call of the tokenizer and every character tokenised once.

    prompt  "<u>hi</u>" "<a>\\n"          response  "yo</a>\\n"
             body        head
    tokenised:  body,  head + response        head alone is known: it recurs in every turn

If tok(head + response) begins with tok(head), no token straddles the boundary: the prompt's ids are what generation is given,
and the rest, which decode to the response, go on from them (the turn is `joined`: as history it tokenises to these ids again).
Where it does not, the response is tokenised apart from its prompt, as generation would have to produce it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sft_plugins.masking.turns.tokenizer import TextTokenizer
from sft_plugins.masking.turns.turns import Turn


class TurnIds(NamedTuple):
    """Ids of a turn's prompt (of what it adds to the row, where it goes on from one) and of its response.

    `joined`: prompt and response text together tokenise to just these ids.
    """

    prompt: list[int]
    response: list[int]
    joined: bool


def encode_turns(text: TextTokenizer, plans: Iterable[list[Turn]]) -> list[list[TurnIds]]:
    """`TurnIds` of every turn of every plan."""
    cuts = [[_cut(text, turn) for turn in turns] for turns in plans]
    wanted = {piece: None for turns in cuts for cut in turns for piece in (cut.body, cut.tail)}
    ids = dict(zip(wanted, text.encode(list(wanted)), strict=True))
    return [[_turn_ids(text, cut, ids) for cut in turns] for turns in cuts]


class _Cut(NamedTuple):
    body: str
    head: str  # empty where the prompt has no safe joint; then `tail` is the bare response
    response: str

    @property
    def tail(self) -> str:
        return self.head + self.response


def _cut(text: TextTokenizer, turn: Turn) -> _Cut:
    prompt = turn.prompt if turn.added is None else turn.added
    joint = text.last_safe_joint(prompt)
    return _Cut(prompt, "", turn.response) if joint is None else _Cut(prompt[:joint], prompt[joint:], turn.response)


def _turn_ids(text: TextTokenizer, cut: _Cut, ids: dict[str, list[int]]) -> TurnIds:
    head = text.encode_short(cut.head) if cut.head else []
    tail = ids[cut.tail]
    prompt = ids[cut.body] + head
    if cut.head and tail[: len(head)] == head and text.goes_on(tail[len(head) :], cut.response):
        return TurnIds(prompt, tail[len(head) :], joined=True)
    return TurnIds(prompt, text.encode_continuations([cut.response])[0], joined=False)
