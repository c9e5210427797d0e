"""Paths as a user writes them, whole text files, and scratch space; what cannot be had is one line with the path.

~/rows.jsonl, ~ann/rows.jsonl  →  the folder of that user        FF FE 7B 00  →  refused as UTF-16, by name
"""

from __future__ import annotations

import atexit
import codecs
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_plugins.errors import AssetError, SFTPluginsError

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def home(path: str | Path) -> Path:
    """`path`, with `~` and `~user` as a shell reads them.

    Raises:
        AssetError: `missing_file` for a user whom this machine does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise AssetError(
            f"{path}: this machine knows no user of that name.",
            code="missing_file",
            remedy="write the whole path, or `./~name` for a folder that is called so.",
        ) from error


def read_text(path: str | Path) -> str:
    """A whole file of UTF-8 text, with or without its mark.

    Raises:
        AssetError: `missing_file`, `unreadable`; `bad_data` for another encoding, named where it can be told.
    """
    with readable(path):
        data = home(path).read_bytes()
    refuse_wide_text(path, data[:8])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AssetError(
            f"{path} cannot be read as UTF-8 text: {error.reason} (byte 0x{data[error.start]:02x}).",
            code="bad_data",
            remedy="save it as UTF-8 text.",
        ) from error


def refuse_wide_text(path: str | Path, head: bytes) -> None:
    """Raise for text of two or four bytes a character, told by its mark or by the zeros between its first characters.

    Raises:
        AssetError: `bad_data`.
    """
    name = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    zeros = tuple(byte == 0 for byte in head[:4])
    if name is None and zeros in ((False, True, False, True), (True, False, True, False)):
        name = "UTF-16"
    if name is not None:
        raise AssetError(
            f"{path} is {name} text; UTF-8 was expected.",
            code="bad_data",
            remedy=f"save it as UTF-8: `iconv -f {name} -t UTF-8 old > new`.",
        )


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """What the system says while `path` is opened becomes an error that names it.

    Raises:
        AssetError: `missing_file`, `unreadable`.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise AssetError(
            f"{path}: there is no such file.",
            code="missing_file",
            remedy="check the path and the folder it starts from.",
        ) from error
    except (OSError, ValueError) as error:  # no permission, a folder, a name that is too long or holds a zero
        if isinstance(error, SFTPluginsError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise AssetError(
            f"{path} cannot be read: {reason}.", code="unreadable", remedy="check who may read it (ls -l)."
        ) from error


def scratch_folder() -> Path:
    """A new temporary folder (under TMPDIR) that is removed when the process ends.

    Raises:
        AssetError: `unwritable` where no folder for temporary files can be written.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="sft-plugins-", ignore_cleanup_errors=True)
    except OSError as error:
        raise no_scratch(error, "") from error
    atexit.register(folder.cleanup)
    return Path(folder.name)


@contextmanager
def writing_rows(file: Path, *, temporary: bool) -> Iterator[None]:
    """A full disk, or one that went away, while rows are written to `file`, in a scratch folder or one that stays.

    Raises:
        AssetError: `unwritable`, with the path.
    """
    try:
        yield
    except OSError as error:
        if temporary:
            raise no_scratch(error, f"{file}: ") from error
        raise AssetError(
            f"{file}: rows cannot be written: {_reason(error)}.",
            code="unwritable",
            remedy="make room there and give the same command again: it goes on from what is written.",
        ) from error


def no_scratch(error: OSError, where: str) -> AssetError:
    """The error for a temporary folder that cannot be written; `where` is said first."""
    return AssetError(
        f"{where}temporary rows cannot be written: {_reason(error)}.",
        code="unwritable",
        remedy="make room there, or set TMPDIR to a folder on a disk that has it.",
    )


def _reason(error: OSError) -> str:
    return " ".join(str(error.strerror or error).split())[:200]
