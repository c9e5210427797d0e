"""Text files of rows, read one row at a time: JSON Lines, one JSON array, CSV.

Invariant: memory is bounded by the largest row, never by the file; what is broken is named by line and column.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sft_plugins.errors import AssetError

Row = dict[str, Any]

MOST_CHARACTERS = 2**28
"""Of one row: beyond it, a file is taken for something else than rows."""
_CHUNK = 2**16
_LONGEST_LITERAL = 16  # of what a chunk's end may cut in two outside strings: `-Infinity`, a `\\ud83d\\ude00`
_BLANK = re.compile(r"\s+")
_WRITE_LINES = "write one complete JSON object per line, or one JSON array of objects."


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON Lines file, or of a file that is one JSON array of objects.

    Raises:
        AssetError: `bad_jsonl` with line and column, `bad_data` for a file that is no text.
    """
    with _text(path) as file:
        first = " "
        while first and first.isspace():
            first = _guarded(file.read, path, 1)
        file.seek(0)
        yield from _array_rows(file, path) if first == "[" else _line_rows(file, path)


def _line_rows(file: TextIO, path: Path) -> Iterator[Row]:
    number = 0
    # Not `for line in file`: a file without a newline would come as one line of any size.
    while line := _guarded(file.readline, path, MOST_CHARACTERS):
        number += 1
        if len(line) == MOST_CHARACTERS:
            raise _too_long(path, number)
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())  # an error at the end is placed on this line, not the next
        except (json.JSONDecodeError, RecursionError) as error:
            column, reason = getattr(error, "colno", 1), getattr(error, "msg", "nested too deeply")
            raise AssetError(
                f"{path}, line {number}, column {column} is not valid JSON: {reason}. Got: {line[:80].rstrip()!r}",
                code="bad_jsonl",
                remedy=_WRITE_LINES,
            ) from error
        yield _object(row, path, number, line)


def _array_rows(file: TextIO, path: Path) -> Iterator[Row]:
    """The objects of `[{…}, {…}]`, one at a time."""
    window = _Window(file, path)
    window.next_character()
    window.advance(1)  # the opening bracket
    character = window.next_character()
    while character != "]":
        line, text = window.line, window.text[window.at : window.at + 80]
        yield _object(window.value(), path, line, text)
        character = window.next_character()
        if character == ",":
            window.advance(1)
            window.next_character()
        elif character != "]":
            raise window.broken("expecting ',' or ']'" if character else "the array is not closed")
    window.advance(1)
    if window.next_character():
        raise window.broken("there is more after the closing bracket")


class _Window:
    """The part of a JSON file in memory: it slides on as values are read, and knows line and column of its place."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 1
        self._decode = json.JSONDecoder().raw_decode

    def advance(self, count: int) -> None:
        """Move the place on by `count` characters."""
        passed = self.text[self.at : self.at + count]
        lines = passed.count("\n")
        self.line += lines
        self.column = len(passed) - passed.rfind("\n") if lines else self.column + count
        self.at += count

    def next_character(self) -> str:
        """Move on over white space; the character there, or "" at the end of the file."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self.advance(0 if blank is None else blank.end() - self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on(1):
                return ""

    def value(self) -> Any:
        """The JSON value that begins here; moves on behind it."""
        size = _CHUNK
        while True:
            self._read_on(size)
            try:
                value, end = self._decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # else a number may go on in the next chunk
                    self.advance(end - self.at)
                    return value
            except RecursionError as error:
                raise self.broken("nested too deeply") from error
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _LONGEST_LITERAL
                if self.ended or not cut:
                    self.advance(error.pos - self.at)
                    raise self.broken(error.msg) from error
            if size > MOST_CHARACTERS:
                raise _too_long(self.path, self.line)
            size *= 2

    def broken(self, reason: str) -> AssetError:
        got = f" Got: {self.text[self.at : self.at + 80]!r}" if self.at < len(self.text) else ""
        return AssetError(
            f"{self.path}, line {self.line}, column {self.column} is not valid JSON: {reason}.{got}",
            code="bad_jsonl",
            remedy=_WRITE_LINES,
        )

    def _read_on(self, least: int) -> bool:
        """Read until `least` characters lie ahead, or the file ends; whether anything lies ahead."""
        if len(self.text) - self.at >= least:
            return True
        self.text, self.at = self.text[self.at :], 0
        pieces, size = [self.text], len(self.text)
        while not self.ended and size < least:
            pieces.append(_guarded(self.file.read, self.path, _CHUNK))
            size += len(pieces[-1])
            self.ended = not pieces[-1]
        self.text = "".join(pieces)
        return bool(self.text)


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV (or .tsv) file with a header; every value is a string.

    Raises:
        AssetError: `bad_data` with the line.
    """
    csv.field_size_limit(MOST_CHARACTERS)
    with _text(path, newline="") as file:
        lines = csv.reader(file, strict=True, delimiter="\t" if path.suffix == ".tsv" else ",")
        header: list[str] | None = None
        while True:
            try:
                values = _guarded(lambda _: next(lines, None), path, 0)
            except csv.Error as error:
                raise AssetError(
                    f"{path}, line {lines.line_num} is not valid CSV: {error}.",
                    code="bad_data",
                    remedy="quote fields that hold commas, quotes or newlines, and double the quotes inside them.",
                ) from error
            if values is None:
                return
            if header is None:
                header = values
                if len(set(header)) < len(header):
                    raise AssetError(
                        f"{path}, line 1 names a column twice: {', '.join(header)}.",
                        code="bad_data",
                        remedy="give every column its own name in the first line.",
                    )
            elif values:
                if len(values) != len(header):
                    raise AssetError(
                        f"{path}, line {lines.line_num} has {len(values)} fields, the header {len(header)}.",
                        code="bad_data",
                        remedy="quote fields that hold commas or newlines.",
                    )
                yield dict(zip(header, values, strict=True))


def _text(path: Path, newline: str | None = "\n") -> TextIO:
    # newline="\n": JSON strings may hold U+2028, and lines are counted as editors count them. BOMs are skipped.
    return path.open(encoding="utf-8-sig", newline=newline)


def _guarded(read: Any, path: Path, size: int) -> Any:
    try:
        return read(size)
    except UnicodeDecodeError as error:
        raise AssetError(
            f"{path} cannot be read as UTF-8 text: {error.reason} (byte 0x{error.object[error.start]:02x}).",
            code="bad_data",
            remedy="unpack it if it is compressed, or save it as UTF-8 text; parquet and Arrow files are known by .parquet "
            "and .arrow.",
        ) from error


def _object(row: Any, path: Path, line: int, text: str) -> Row:
    if isinstance(row, dict):
        return row
    raise AssetError(
        f"{path}, line {line} holds a JSON {type(row).__name__}, an object was expected. Got: {text[:80].rstrip()!r}",
        code="bad_jsonl",
        remedy='write one object per row, such as {"prompt": "…", "response": "…"}.',
    )


def _too_long(path: Path, line: int) -> AssetError:
    return AssetError(
        f"{path}, line {line}: one row has more than {MOST_CHARACTERS:,} characters.",
        code="bad_data",
        remedy="check that the file holds rows, one JSON object per line or one array of them.",
    )
