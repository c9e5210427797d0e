"""Models and data of the demo: real ones out of packages, or the user's own.

Nothing here guesses: what is missing or unreadable is an `AssetError` that says what to install or to fix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sft_plugins import preflight
from sft_plugins.cli.demo.smollm2 import smollm2_folder
from sft_plugins.errors import AssetError
from sft_plugins.preflight import Row, open_data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Row", "chitchat_rows", "load_model", "load_rows", "messages_by_turn", "split_held_out", "to_dataset"]


def load_model(source: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model `source` (a folder or a hub id) and its tokenizer; by default SmolLM2-135M-Instruct out of its package."""
    return preflight.load_model(str(smollm2_folder()) if source is None else source)


def load_rows(path: Path | None = None) -> list[Row]:
    """Training rows in any form the masker takes: from a file or folder, or by default `chitchat_rows()`."""
    return chitchat_rows() if path is None else list(open_data(path).rows())


def chitchat_rows() -> list[Row]:
    """The Chit-Chat dataset (BYU, MIT licence) as rows of `messages`: about 4,000 conversations between two people.

    Consecutive messages of one person become one turn, their lines joined by a newline. Who speaks first is the user,
    the other the assistant. Conversations that nobody answered are left out, as is a last turn of the user's.

    Raises:
        AssetError: `missing_package` when `chitchat-dataset` is not installed.
    """
    spec = find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise AssetError(
            "the default conversations come from a Python package, and `chitchat_dataset` is not installed.",
            code="missing_package",
            remedy="run `pip install chitchat-dataset`, or bring your own with --data FILE.jsonl.",
        )
    conversations = json.loads((Path(spec.origin).parent / "dataset.json").read_text(encoding="utf-8"))
    rows = (messages_by_turn([m for group in c["messages"] for m in group]) for c in conversations.values())
    return [{"messages": messages} for messages in rows if messages]


def messages_by_turn(texts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """`[{"sender", "text"}, …]` as alternating user and assistant messages that end with the assistant's.

    A: hi / A: all well? / B: yes / A: good  →  user "hi\\nall well?", assistant "yes". Empty where more or fewer
    than two people speak.
    """
    turns: list[tuple[str, list[str]]] = []
    for item in texts:
        text = item["text"].strip()
        if text and turns and turns[-1][0] == item["sender"]:
            turns[-1][1].append(text)
        elif text:
            turns.append((item["sender"], [text]))
    if len({sender for sender, _ in turns}) != 2:
        return []
    turns = turns[: len(turns) // 2 * 2]
    return [{"role": ("user", "assistant")[i % 2], "content": "\n".join(lines)} for i, (_, lines) in enumerate(turns)]


def split_held_out(rows: Sequence[Row], held_out: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices `(train, held_out)` into `rows`: a row's side depends on its content and the seed, not on its place.

    Rows are ordered by a hash of seed and content, and the first `held_out` are held out. Exact copies of a held-out row
    go with it, so that no conversation is ever on both sides.
    """

    def key(row: Row) -> str:
        content = json.dumps(row, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(f"{seed}:{content}".encode(errors="surrogatepass")).hexdigest()

    keys = [key(row) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    apart = {keys[i] for i in order[:held_out]}
    return [i for i in order if keys[i] not in apart], [i for i in order if keys[i] in apart]


def to_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows as a `datasets.Dataset`; columns are those of all rows, None where a row has no such key.

    Raises:
        AssetError: `bad_jsonl` when a column holds values of types that do not go together.
    """
    import pyarrow
    from datasets import Dataset

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (pyarrow.ArrowException, TypeError, UnicodeError) as error:
        raise AssetError(
            f"the rows do not form a table: {error}",
            code="bad_jsonl",
            remedy="give every column one type in all rows (`messages` a list of objects, say, never a string here and "
            "a list there).",
        ) from error
