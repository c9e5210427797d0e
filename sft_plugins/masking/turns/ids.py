"""Texts of turns → ids. All texts of a chunk of rows go through the tokenizer in one call, and every character once:

    prompt  "<u>hi</u>" "<a>\\n"          response  "yo</a>\\n"
             body        head
    tokenised:  body,  head + response        head alone is known: it recurs in every turn

Of a conversation that is split into rows, whose prompts begin alike, the bodies are cut wherever they may be, and each of
their pieces is tokenised once.

If tok(head + response) begins with tok(head), no token straddles the boundary: the prompt's ids are what generation is
given, and the rest, which decode to the response, go on from them (the turn is `joined`: as history it tokenises to these
ids again). Where it does not, the response is tokenised apart from its prompt, as generation would have to produce it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, pairwise
from typing import NamedTuple

from sft_plugins.masking.turns.tokenizer import TextTokenizer
from sft_plugins.masking.turns.turns import Turn


class TurnIds(NamedTuple):
    """Ids of a turn's prompt (of what it adds to the row, where it goes on from one) and of its response.

    `joined`: prompt and response text together tokenise to just these ids. `exact`: both stand for the very bytes of their
    texts, so that they need not be decoded to be compared.
    """

    prompt: list[int]
    response: list[int]
    joined: bool
    exact: bool = False


class Cuts(NamedTuple):
    """Turns, plan by plan, as texts that are tokenised by themselves, and those `texts`, each once."""

    turns: list[list[_Cut]]
    texts: list[str]


def cut_turns(text: TextTokenizer, plans: Iterable[list[Turn]]) -> Cuts:
    """What the tokenizer is given for `plans`."""
    cuts = [_cut_split(text, turns) if _is_split(turns) else [_cut(text, turn) for turn in turns] for turns in plans]
    wanted = {piece: None for turns in cuts for cut in turns if not cut.plain for piece in (*cut.body, cut.tail)}
    return Cuts(cuts, list(wanted))


def turn_ids(text: TextTokenizer, cuts: Cuts) -> list[list[TurnIds]]:
    """`TurnIds` of every turn of every plan."""
    encoded = text.encode(cuts.texts)
    exact = bool(encoded) and text.decode_exactly(cuts.texts, encoded)
    ids = dict(zip(cuts.texts, encoded, strict=True))
    prompts = [[_prompt(text, cut, ids) for cut in turns] for turns in cuts.turns]
    joined = [
        [_joined(text, cut, prompt, ids, exact=exact) for cut, prompt in zip(*pair, strict=True)]
        for pair in zip(cuts.turns, prompts, strict=True)
    ]
    alone = [
        cut.response
        for pair in zip(cuts.turns, joined, strict=True)
        for cut, one in zip(*pair, strict=True)
        if one is None
    ]
    responses = text.encode_continuations(alone)
    exact = exact and bool(alone) and text.decode_exactly(alone, responses)
    response = iter(responses)
    return [
        [
            one or TurnIds(prompt, next(response), joined=False, exact=exact and _is_exact(text, cut))
            for cut, prompt, one in zip(*turns, strict=True)
        ]
        for turns in zip(cuts.turns, prompts, joined, strict=True)
    ]


class _Cut(NamedTuple):
    body: list[str]  # in pieces, each tokenised by itself
    head: str  # empty where the prompt has no safe joint; then `tail` is the bare response
    response: str
    plain: bool

    @property
    def tail(self) -> str:
        return self.head + self.response


def _is_split(turns: list[Turn]) -> bool:
    return any(turn.added is None for turn in turns[1:])


def _cut(text: TextTokenizer, turn: Turn) -> _Cut:
    prompt = turn.prompt if turn.added is None else turn.added
    joints = [] if turn.plain else text.safe_joints(prompt)
    if not joints:
        return _Cut([prompt], "", turn.response, turn.plain)
    return _Cut([prompt[: joints[-1]]], prompt[joints[-1] :], turn.response, turn.plain)


def _cut_split(text: TextTokenizer, turns: list[Turn]) -> list[_Cut]:
    """Bodies in pieces. What a prompt has in common with the one before it, up to that one's head, is cut as it was there."""
    cuts: list[_Cut] = []
    body: list[str] = []
    stem = ""  # the pieces of `body`, joined
    for turn in turns:
        prompt = turn.prompt if turn.added is None else turn.added
        known = len(stem) if stem and prompt.startswith(stem) else 0
        joints = text.safe_joints(prompt, known)
        if known and joints[:1] != [known]:
            known, joints = 0, text.safe_joints(prompt)
        if turn.plain or not joints:
            cuts.append(_Cut([prompt], "", turn.response, turn.plain))
            continue
        places = joints if known else [0, *(joint for joint in joints if joint)]
        pieces = [prompt[start:end] for start, end in pairwise(places)]
        body = [*body, *pieces] if known else pieces or [""]
        stem = prompt[: joints[-1]]
        cuts.append(_Cut(body, prompt[joints[-1] :], turn.response, turn.plain))
    return cuts


def _prompt(text: TextTokenizer, cut: _Cut, ids: dict[str, list[int]]) -> list[int]:
    if cut.plain:
        return text.encode_prompt(cut.body[0])
    pieces = [ids[piece] for piece in cut.body]
    body = pieces[0] if len(pieces) == 1 else list(chain.from_iterable(pieces))
    return body + text.encode_short(cut.head) if cut.head else body


def _is_exact(text: TextTokenizer, cut: _Cut) -> bool:
    """Whether the prompt's ids are its very bytes, where those of all texts are. A BOS of a plain prompt stands for none."""
    return not cut.plain and (not cut.head or text.short_is_exact(cut.head))


def _joined(
    text: TextTokenizer, cut: _Cut, prompt: list[int], ids: dict[str, list[int]], *, exact: bool
) -> TurnIds | None:
    """The turn whose response goes on from its head. `exact`: every text of `ids` is known to be what its ids stand for."""
    if not cut.head:
        return None
    head, tail = text.encode_short(cut.head), ids[cut.tail]
    if tail[: len(head)] != head:
        return None
    response = tail[len(head) :]
    # What is left of a tail's bytes behind those of its head are the response's.
    if exact and _is_exact(text, cut):
        return TurnIds(prompt, response, joined=True, exact=True)
    return TurnIds(prompt, response, joined=True) if text.goes_on(response, cut.response) else None
