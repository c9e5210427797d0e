"""Options that several commands take, each said once: a command writes `model: options.MODEL`."""

from __future__ import annotations

from typing import Annotated

import typer

from sft_plugins._options import Overflow, Reasoning, Thinking, TrainOn

# --- what is read -----------------------------------------------------------------------------------------------------

DATA = Annotated[
    str,
    typer.Argument(
        help="A .jsonl, .json, .csv, .parquet or .arrow file, a folder of `save_to_disk`, or Axolotl's "
        "`dataset_prepared_path`.",
        show_default=False,
    ),
]
MODEL = Annotated[str, typer.Option("--model", "-m", help="Whose tokenizer: a folder or a hub id.", show_default=False)]
SPLIT = Annotated[str | None, typer.Option(help="Which split, where a saved folder holds several.")]
LIMIT = Annotated[int | None, typer.Option(min=1, help="Look at the first rows only.")]

# --- how it is masked -------------------------------------------------------------------------------------------------

TRAIN_ON = Annotated[TrainOn, typer.Option(help="Assistant turns that are trained.")]
MAX_LENGTH = Annotated[int | None, typer.Option(min=2, help="Most tokens of a row.")]
OVERFLOW = Annotated[
    Overflow,
    typer.Option(
        help="What becomes of rows beyond --max-length: refused, dropped, cut, or cut after the last whole turn."
    ),
]
SPECIAL_TOKENS = Annotated[
    str,
    typer.Option(
        "--special-tokens-in-content",
        help="Whether text of the data may turn into special tokens: raise, allow, or those that may, with commas between "
        "(<filename>,<think>).",
    ),
]
THINKING = Annotated[
    Thinking,
    typer.Option(
        help="Prompts that a template's switches (enable_thinking) give: per turn what fits, or the default alone."
    ),
]
REASONING = Annotated[
    Reasoning,
    typer.Option(help="Reasoning that a template does not know: refused, put before the answer, or left out."),
]
ROLE = Annotated[
    list[str] | None,
    typer.Option("--role", help="What a further name of a speaker means, as critic=user; as often as needed."),
]
IGNORE_COLUMN = Annotated[
    list[str] | None,
    typer.Option("--ignore-column", help="A column, or a key of messages, that is not looked at; as often as needed."),
]

# --- where it runs, and what is written -------------------------------------------------------------------------------

DEVICE = Annotated[str, typer.Option(help='"auto" takes a GPU if there is one; else "cpu", "cuda", "cuda:1".')]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors; the exit code tells.")]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
