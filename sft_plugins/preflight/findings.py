"""What a check found, as data: one `Finding` per fault, the colour that all of them come to, and what to do about each code.

Numbers (`M7`) are those of `docs/known-failures.md`. A fault of one row carries the row's own message; the remedy here is for
the whole source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]
Part = Literal["config", "data", "masking", "packing"]
Colour = Literal["green", "amber", "red"]

PARTS: tuple[Part, ...] = ("config", "data", "masking", "packing")
_COLOURS: dict[Level, Colour] = {"error": "red", "warning": "amber", "note": "green"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault, or one thing worth knowing.

    Attributes:
        level: `error` spoils the training, `warning` may, `note` does not.
        part: which of the checks found it.
        code: stable name of the fault.
        where: a file, a setting, an entry of `datasets`.
        message: what was found. remedy: what to do.
        count: units it concerns (1 for a setting). rows: the first rows that hold them, counted from 0.
        unit: what is counted; a packed row holds several documents.
        unchecked: what this finding says was not looked at, in a few words; empty for one that was measured.
        failure: the failure of the field that it is an instance of, `"M7"`, `"P1"`.
    """

    level: Level
    part: Part
    code: str
    where: str
    message: str
    remedy: str = ""
    count: int = 1
    rows: tuple[int, ...] = ()
    unit: Literal["row", "document"] = "row"
    unchecked: str = ""
    failure: str = ""

    @property
    def places(self) -> str:
        """`3 rows (#0, #4, #9)`, or "" for a setting."""
        if not self.rows:
            return ""
        first = ", ".join(f"#{row}" for row in self.rows)
        held = f"{first}, …" if self.count > len(self.rows) else first
        held = held if self.unit == "row" else f"of rows {held}"
        return f"{self.count:,} {self.unit}{'s' if self.count > 1 else ''} ({held})"


def colour(findings: Iterable[Finding]) -> Colour:
    """`red` with any error, else `amber` with any warning, else `green`."""
    found = {_COLOURS[finding.level] for finding in findings}
    return "red" if "red" in found else "amber" if "amber" in found else "green"


FAILURES = {
    "boundaries": "P8",
    "boundary": "M3",
    "bad_schema": "M12",
    "content_lost": "M6",
    "double_bos": "M17",
    "empty_response": "M11",
    "first_label": "P7",
    "generation_goes_on": "M26",
    "history_rewrite": "M9",
    "label_mismatch": "M2",
    "length_mismatch": "M15",
    "mask_ignored": "M14",
    "missing_stop": "M7",
    "no_generation_markers": "M5",
    "no_supervised_tokens": "M13",
    "null_filled_arguments": "M19",
    "overflow": "M22",
    "prepacked_rows": "P10",
    "prompt_supervised": "M2",
    "render_mismatch": "M10",
    "special_token_in_content": "M21",
    "text_after_stop": "M8",
    "unsupervised_turn": "M16",
}

REMEDIES = {
    "bad_schema": "Correct those rows: roles are system, user, assistant and tool, contents are text.",
    "boundary": "Use a template whose turns begin at a token of their own, or mask with PromptMasker, which refuses such rows.",
    "content_lost": "Use a template that writes the whole content of a message.",
    "double_bos": "Leave the text's own beginning-of-sequence token out, or set `add_bos_token=False` on the tokenizer.",
    "empty_response": "Remove those rows, or write the answer.",
    "first_label": "Set the first label of every document to −100: nothing comes before its token.",
    "few_supervised_tokens": "Check that the answers are where the configuration looks for them.",
    "history_rewrite": "Mask with PromptMasker, which makes rows that are each exact, or train on the last turn only.",
    "id_out_of_range": "Tokenise again with this model's tokenizer.",
    "label_mismatch": "A label is the token at its own place or −100; do not shift labels.",
    "boundaries": "Pack again; `seq_lengths` are positive and add up to the row.",
    "length_mismatch": "Tokenise again; every mask column is as long as `input_ids`.",
    "mask_ignored": "Write `labels` (−100 where no loss is wanted): mask_dataset honours mask columns and writes them.",
    "missing_stop": "Train the token that ends an answer: without it the model does not stop. Do not mask labels by pad id.",
    "no_generation_markers": "Mask with PromptMasker, which needs no markers.",
    "no_supervised_tokens": "Raise the length limit or remove those rows: they train nothing.",
    "null_filled_arguments": "Mask with PromptMasker (it leaves nulls out), or store arguments as JSON strings.",
    "overflow": "Raise the length limit, or choose what becomes of long rows with `overflow`.",
    "prepacked_rows": 'Use BlockDiagonalPackingCollator with sft_arguments("packed"); --components checks it so.',
    "prompt_supervised": "Mask again with PromptMasker: loss lies on the prompt.",
    "prompts_trained": "Mask with PromptMasker, or leave it so if the model is to learn the prompts too.",
    "render_mismatch": "Pass the `chat_template_kwargs` that generation will use, or take a template whose generation prompt "
    "is the beginning of the turn.",
    "special_token_in_content": "Remove the markers from the text: they forge turns.",
    "template_error": "Correct those rows, or take a template that accepts them.",
    "text_after_stop": "Mask with PromptMasker, which trains nothing after the stop token.",
    "unsupervised_turn": "Train every answer of a row, or say which with `weight` or `train`.",
}
