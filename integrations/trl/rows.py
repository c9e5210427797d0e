"""What TRL 1.16 does to rows that it masks itself, and that neither the rows nor our report of them show."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sft_plugins.masking import MASK_COLUMNS
from sft_plugins.preflight import FAILURES, REMEDIES, DataEntry, Finding, Level, Part, Source

_MARKERS = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, kw_only=True)
class TRLRows:
    """`assistant_only_loss` and `completion_only_loss` (None: on for rows with a `prompt`) of the configuration."""

    assistant_only: bool
    completion_only: bool | None

    def look(self, entry: DataEntry, source: Source, tokenizer: Any) -> Iterator[Finding]:
        """The faults of TRL's own masks on the rows of `entry`."""
        first = next(source.rows())

        def finding(level: Level, part: Part, code: str, message: str) -> Finding:
            return Finding(
                level=level, part=part, code=code, where=f"{entry.where}: {entry.path}", message=message,
                remedy=REMEDIES[code], failure=FAILURES[code],
            )  # fmt: skip

        if source.kind == "packed":
            yield finding(
                "error",
                "packing",
                "prepacked_rows",
                "the rows are packed; TRL removes `seq_lengths` and reads each row as one document.",
            )
        masks = [name for name in MASK_COLUMNS if first.get(name) is not None]
        if masks and first.get("labels") is None and not self._reads(masks):
            yield finding(
                "error",
                "masking",
                "mask_ignored",
                f"rows have `input_ids` and `{masks[0]}`, but no `labels`: TRL trains every token of them.",
            )
        if source.kind == "raw" and self.assistant_only and not self._has_markers(entry, tokenizer):
            yield finding(
                "error",
                "masking",
                "no_generation_markers",
                "`assistant_only_loss` needs `{% generation %}` in the chat template; it has none, and TRL has none to put "
                "in its place.",
            )
        straddled = _straddled(source, tokenizer)
        if straddled:
            yield dataclasses.replace(
                finding(
                    "error",
                    "masking",
                    "boundary",
                    "a token holds the end of the prompt and the beginning of the answer: TRL tokenises both together, and "
                    "cuts where the prompt alone would end.",
                ),
                count=len(straddled),
                rows=tuple(straddled[:5]),
            )
        tail = _after_the_stop(source, entry, tokenizer) if self.completion_only in (None, True) else ""
        if tail:
            yield finding(
                "warning",
                "masking",
                "text_after_stop",
                f"the template writes {tail!r} after the stop token, and TRL puts loss on it.",
            )

    def _reads(self, masks: list[str]) -> bool:
        return bool(
            ("completion_mask" in masks and self.completion_only)
            or ("assistant_masks" in masks and self.assistant_only)
        )

    def _has_markers(self, entry: DataEntry, tokenizer: Any) -> bool:
        template = entry.chat_template or getattr(tokenizer, "chat_template", None)
        if _MARKERS.search(str(template)):
            return True
        try:
            from trl.chat_template_utils import get_training_chat_template
        except ImportError:
            return False
        try:
            get_training_chat_template(tokenizer)
        except ValueError:  # TRL has no template of its own to put in its place
            return False
        return True


def _straddled(source: Source, tokenizer: Any) -> list[int]:
    """Rows of strings in which the ids of the prompt are not the first ids of prompt and completion together."""
    rows = []
    for index, row in enumerate(source.rows()):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            continue
        alone, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion))
        if whole[: len(alone)] != alone:
            rows.append(index)
    return rows


def _after_the_stop(source: Source, entry: DataEntry, tokenizer: Any) -> str:
    """What the template renders after the last stop token of a conversational prompt and completion; often "\\n"."""
    for row in source.rows():
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(completion, list) or not isinstance(prompt, list):
            return ""
        try:
            text = tokenizer.apply_chat_template(
                [*prompt, *completion], chat_template=entry.chat_template, tokenize=False
            )
        except Exception:  # a template may refuse a row in any way; such rows are counted as template_error
            continue
        before, stop, after = text.rpartition(tokenizer.eos_token or "\0")
        return after if stop and before else ""
    return ""
