"""The picture of a masked row says what the labels say."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from sft_plugins.cli.ui.render import STYLES, has_colour, legend, masked_row, token_kinds
from testkit.tokenizers import build_tokenizer


def row(tokenizer, *pieces: tuple[str, bool]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in pieces:
        made = tokenizer(text)["input_ids"]
        ids += made
        labels += made if trained else [-100] * len(made)
    return ids, labels


def test_the_last_label_of_every_run_is_the_stop_token() -> None:
    assert token_kinds([-100, 7, 8, 2, -100, 2]) == ["prompt", "trained", "trained", "stop", "prompt", "stop"]
    assert token_kinds([]) == []


def test_without_colour_brackets_mark_exactly_the_trained_text() -> None:
    tokenizer = build_tokenizer("bytelevel")
    ids, labels = row(tokenizer, ("Hi 😀\n", False), ("fine ☺, thanks<|im_end|>", True), ("\n", False))
    assert masked_row(tokenizer, ids, labels, colour=False).plain == "Hi 😀\n[[fine ☺, thanks]]((<|im_end|>))\n"


def test_with_colour_styles_cover_exactly_the_same_text_and_no_bracket_is_added() -> None:
    tokenizer = build_tokenizer("bytelevel")
    ids, labels = row(tokenizer, ("Hi ", False), ("fine<|im_end|>", True))
    text = masked_row(tokenizer, ids, labels, colour=True)
    assert text.plain == "Hi fine<|im_end|>"
    assert {str(span.style): text.plain[span.start : span.end] for span in text.spans} == {
        STYLES["prompt"]: "Hi ",
        STYLES["trained"]: "fine",
        STYLES["stop"]: "<|im_end|>",
    }


def test_long_rows_are_cut_and_counted() -> None:
    tokenizer = build_tokenizer("bytelevel")
    ids, labels = row(tokenizer, ("one two three four five six", False))
    assert masked_row(tokenizer, ids, labels, colour=False, most=2).plain.endswith(f" … and {len(ids) - 2} more tokens")


def test_terminal_escapes_in_the_data_are_shown_not_obeyed() -> None:
    tokenizer = build_tokenizer("bytelevel")
    ids, labels = row(tokenizer, ("a\x1b[31mb", False))
    assert masked_row(tokenizer, ids, labels, colour=True).plain == "a\\x1b[31mb"


@pytest.mark.parametrize(
    ("options", "colour"), [({"force_terminal": True, "color_system": "truecolor"}, True), ({}, False)]
)
def test_a_pipe_gets_no_colour(options: dict, colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    console = Console(file=io.StringIO(), **options)
    assert has_colour(console) is colour
    console.print(Text.assemble(legend(colour=colour)))
    assert ("\x1b[" in console.file.getvalue()) is colour
    assert ("[[trained]]" in console.file.getvalue()) is not colour
