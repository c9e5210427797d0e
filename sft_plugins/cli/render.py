"""A masked row for the eye: trained tokens, their stop tokens and untrained tokens told apart by colour, or by brackets.

Colour is only used where the terminal has it; in a pipe, a file or under NO_COLOR the same row reads

    <|im_start|>user⏎ hi<|im_end|>⏎ <|im_start|>assistant⏎ [[hello]]((<|im_end|>))⏎
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from sft_plugins._constants import IGNORE_INDEX

Kind = Literal["untrained", "trained", "stop"]
STYLES: dict[Kind, str] = {"untrained": "bright_black", "trained": "bold green", "stop": "bold black on yellow"}
BRACKETS: dict[Kind, tuple[str, str]] = {"untrained": ("", ""), "trained": ("[[", "]]"), "stop": ("((", "))")}


def token_kinds(labels: Sequence[int]) -> list[Kind]:
    """What each token is: a stop token is the last label of a supervised run.

    labels −100 −100 7 8 2 −100  →  untrained untrained trained trained stop untrained
    """
    supervised = [label != IGNORE_INDEX for label in labels] + [False]
    return ["untrained" if not now else "trained" if after else "stop" for now, after in pairwise(supervised)]


def masked_row(
    tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], *, colour: bool, most: int = 220
) -> Text:
    """The row's text, its tokens marked; at most `most` tokens, the rest counted.

    Neighbouring tokens of one kind are decoded together, since one character may take several tokens.
    """
    text = Text()
    kinds = token_kinds(labels)[:most]
    position = 0
    for kind, run in groupby(kinds):
        count = len(list(run))
        piece = _printable(tokenizer.decode(input_ids[position : position + count]))
        before, after = ("", "") if colour else BRACKETS[kind]
        text.append(f"{before}{piece}{after}", style=STYLES[kind] if colour else "")
        position += count
    if len(labels) > most:
        text.append(f" … and {len(labels) - most} more tokens")
    return text


def legend(*, colour: bool) -> Text:
    """What the marks of `masked_row` mean."""
    names: dict[Kind, str] = {"trained": "trained", "stop": "trained stop token", "untrained": "not trained"}
    pieces: list[Text] = []
    for kind, name in names.items():
        before, after = ("", "") if colour else BRACKETS[kind]
        pieces.append(Text(f"{before}{name}{after}", style=STYLES[kind] if colour else ""))
    return Text("   ").join(pieces)


def has_colour(console: Console) -> bool:
    """Whether what is written to `console` keeps its colours."""
    return console.color_system is not None and not console.no_color


def _printable(text: str) -> str:
    """Data may hold terminal control sequences; they are shown, not obeyed."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
