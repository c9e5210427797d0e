"""Options that several commands take, each said once: a command writes `model: options.MODEL`, `masking: options.Masking`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from sft_plugins._options import Overflow, Reasoning, SpecialTokens, Thinking, TrainOn, words

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

MAX_LENGTH = Annotated[int | None, typer.Option(min=2, help="Most tokens of a row.")]
OVERFLOW = Annotated[
    Overflow,
    typer.Option(
        help="What becomes of rows beyond --max-length: refused, dropped, cut, or cut after the last whole turn."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What `PromptMasker` is told, lengths aside."""

    train_on: Annotated[TrainOn, typer.Option(help="Assistant turns that are trained.")] = "all"
    special_tokens: Annotated[
        str,
        typer.Option(
            "--special-tokens-in-content",
            help="Whether text of the data may turn into special tokens: raise, allow, or those that may, with commas "
            "between (<filename>,<think>).",
        ),
    ] = "raise"
    thinking: Annotated[
        Thinking,
        typer.Option(
            help="Prompts that a template's switches (enable_thinking) give: per turn what fits, or the default alone."
        ),
    ] = "auto"
    reasoning: Annotated[
        Reasoning,
        typer.Option(help="Reasoning that a template does not know: refused, put before the answer, or left out."),
    ] = "raise"
    role: Annotated[
        list[str] | None,
        typer.Option("--role", help="What a further name of a speaker means, as critic=user; as often as needed."),
    ] = None
    ignore_column: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore-column", help="A column, or a key of messages, that is not looked at; as often as needed."
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """In the words of `PromptMasker`."""
        special = self.special_tokens
        return {
            "train_on": self.train_on,
            "special_tokens_in_content": special if special in words(SpecialTokens) else special.split(","),
            "thinking": self.thinking,
            "reasoning": self.reasoning,
            "roles": {name: meaning for name, _, meaning in (one.partition("=") for one in self.role or ())},
            "ignore_columns": self.ignore_column or (),
        }

    def given(self) -> dict[str, Any]:
        """`options`, without those that are left as they are."""
        usual = Masking().options()
        return {name: value for name, value in self.options().items() if value != usual[name]}


# --- where it runs ----------------------------------------------------------------------------------------------------------

DEVICE = Annotated[str, typer.Option(help='"auto" takes a GPU if there is one; else "cpu", "cuda", "cuda:1".')]
