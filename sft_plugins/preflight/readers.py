"""Text files of rows, read one row at a time: JSON Lines, one JSON array, CSV.

Invariant: memory is bounded by the largest row, never by the file; what is broken is named by line and column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sft_plugins.preflight.errors import AssetError

Row = dict[str, Any]

MOST_CHARACTERS = 2**28
"""Of one row: beyond it, a file is taken for something else than rows."""
_CHUNK = 2**16
_LONGEST_LITERAL = 16  # of what a chunk's end may cut in two outside strings: `-Infinity`, a `\\ud83d\\ude00`
_WRITE_LINES = "write one complete JSON object per line, or one JSON array of objects."


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON Lines file, or of a file that is one JSON array of objects.

    Raises:
        AssetError: `bad_jsonl` with line and column, `bad_data` for a file that is no text.
    """
    with _text(path) as file:
        first = " "
        while first and first.isspace():
            first = file.read(1)
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
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            column, reason = getattr(error, "colno", 1), getattr(error, "msg", "nested too deeply")
            raise AssetError(
                f"{path}, line {number}, column {column} is not valid JSON: {reason}. Got: {line[:80].rstrip()!r}",
                code="bad_jsonl",
                remedy=_WRITE_LINES,
            ) from error
        yield _object(row, path, number, line)


def _array_rows(file: TextIO, path: Path) -> Iterator[Row]:
    """The objects of `[{…}, {…}]`, decoded out of a window that slides over the file."""
    decode = json.JSONDecoder().raw_decode
    window, at, line, ended = "", 0, 1, False

    def more(least: int) -> bool:
        """Read on until `least` characters lie beyond `at`, or the file ends."""
        nonlocal window, at, ended
        if at:
            window, at = window[at:], 0
        while not ended and len(window) < least:
            chunk = _guarded(file.read, path, _CHUNK)
            ended = not chunk
            window += chunk
        return len(window) >= least

    def skip_space() -> str:
        """The next character that is no white space; "" at the end."""
        nonlocal at, line
        while True:
            while at < len(window):
                if not window[at].isspace():
                    return window[at]
                line += window[at] == "\n"
                at += 1
            if not more(1):
                return ""

    def broken(reason: str, offset: int = 0) -> AssetError:
        before = window[at : at + offset]
        column = offset - before.rfind("\n") if "\n" in before else offset + 1
        return AssetError(
            f"{path}, line {line + before.count(chr(10))}, column {column} of its line or row is not valid JSON: {reason}. "
            f"Got: {window[at + offset : at + offset + 80]!r}",
            code="bad_jsonl",
            remedy=_WRITE_LINES,
        )

    skip_space()
    at += 1  # the opening bracket
    if skip_space() == "]":
        at += 1
    else:
        while True:
            skip_space()
            size = _CHUNK
            while True:
                more(size)
                try:
                    row, end = decode(window, at)
                    if end < len(window) or ended:  # else a number may go on in the next chunk
                        break
                except RecursionError as error:
                    raise broken("nested too deeply") from error
                except json.JSONDecodeError as error:
                    cut = error.msg.startswith("Unterminated string") or error.pos > len(window) - _LONGEST_LITERAL
                    if ended or not cut:
                        raise broken(error.msg, error.pos - at) from error
                if size > MOST_CHARACTERS:
                    raise _too_long(path, line)
                size *= 2
            yield _object(row, path, line, window[at:end])
            line += window.count("\n", at, end)
            at = end
            following = skip_space()
            if following not in (",", "]"):
                raise broken("Expecting ',' or ']'" if following else "the array is not closed")
            at += 1
            if following == "]":
                break
    if skip_space():
        raise broken("data after the closing bracket")


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV file with a header; every value is a string.

    Raises:
        AssetError: `bad_data` with the line.
    """
    csv.field_size_limit(MOST_CHARACTERS)
    with _text(path, newline="") as file:
        lines = csv.reader(file, strict=True)
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
