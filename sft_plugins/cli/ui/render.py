"""A masked row for the eye: each kind of token told apart by colour, or by brackets.

Colour is only used where the terminal has it; in a pipe, a file or under NO_COLOR the same row reads

    <|im_start|>user⏎ hi<|im_end|>⏎ <|im_start|>assistant⏎ [[hello]]((<|im_end|>))⏎
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from sft_plugins._constants import IGNORE_INDEX

Kind = Literal["prompt", "special", "trained", "stop", "padding"]
STYLES: dict[Kind, str] = {
    "prompt": "bright_black",
    "special": "cyan",
    "trained": "bold green",
    "stop": "bold black on yellow",
    "padding": "strike bright_black",
}
BRACKETS: dict[Kind, tuple[str, str]] = {
    "prompt": ("", ""),
    "special": ("", ""),
    "trained": ("[[", "]]"),
    "stop": ("((", "))"),
    "padding": ("{{", "}}"),
}
NAMES: dict[Kind, str] = {
    "trained": "trained",
    "stop": "trained stop token",
    "prompt": "not trained",
    "special": "special token, not trained",
    "padding": "padding",
}


def token_kinds(
    labels: Sequence[int],
    *,
    input_ids: Sequence[int] = (),
    special_ids: Collection[int] = (),
    stop_ids: Collection[int] | None = None,
    attention_mask: Sequence[int] | None = None,
) -> list[Kind]:
    """What each token is: a stop token is the last label of a supervised run.

    labels −100 −100 7 8 2 −100  →  prompt prompt trained trained stop prompt

    Args:
        labels: `[T]`.
        input_ids: `[T]`, to tell untrained special tokens by their ids in `special_ids`.
        stop_ids: where given, a run that ends on another id (a cut answer) ends on an ordinary trained token.
        attention_mask: `[T]`, 0 on padding.
    """
    supervised = [label != IGNORE_INDEX for label in labels] + [False]
    kinds: list[Kind] = []
    for i, (now, after) in enumerate(pairwise(supervised)):
        if attention_mask is not None and not attention_mask[i]:
            kinds.append("padding")
        elif now:
            kinds.append("stop" if not after and (stop_ids is None or labels[i] in stop_ids) else "trained")
        else:
            kinds.append("special" if special_ids and input_ids[i] in special_ids else "prompt")
    return kinds


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
        text.append_text(marked(tokenizer.decode(input_ids[position : position + count]), kind, colour=colour))
        position += count
    if len(labels) > most:
        text.append(f" … and {len(labels) - most} more tokens")
    return text


def marked_tokens(texts: Sequence[str], kinds: Sequence[Kind], *, colour: bool) -> Text:
    """`texts` of tokens one after the other, neighbours of one kind marked together, line ends made visible."""
    text = Text()
    for kind, run in groupby(zip(texts, kinds, strict=True), key=lambda pair: pair[1]):
        pieces = [piece for piece, _ in run]
        shown = f"padding ×{len(pieces)}" if kind == "padding" else "".join(pieces).replace("\n", "⏎\n")
        text.append_text(marked(shown, kind, colour=colour))
    return text


def marked(text: str, kind: Kind, *, colour: bool) -> Text:
    """`text` in the colour of its kind, or between its brackets."""
    before, after = ("", "") if colour else BRACKETS[kind]
    return Text(f"{before}{printable(text)}{after}", style=STYLES[kind] if colour else "")


def legend(*, colour: bool, kinds: Sequence[Kind] = ("trained", "stop", "prompt")) -> Text:
    """What the marks of `kinds` mean."""
    return Text("   ").join(marked(NAMES[kind], kind, colour=colour) for kind in kinds)


def has_colour(console: Console) -> bool:
    """Whether what is written to `console` keeps its colours."""
    return console.color_system is not None and not console.no_color


def printable(text: str) -> str:
    """Data may hold terminal control sequences; they are shown, not obeyed."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
