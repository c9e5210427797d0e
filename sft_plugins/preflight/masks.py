"""One source of rows, held to the invariants of exact masking as the run would mask it.

    rows ── PromptMasker(errors="drop") ──► masked rows, MaskReport ── faults by code ──► Findings
    rows already tokenised ── check_masks ──►      "                         "

What a code means depends on who masks: where we do, a history that a template rewrites is split, and noted; where the host
does, it is trained wrongly, and an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_plugins.errors import AssetError
from sft_plugins.masking import MaskReport, PromptMasker, check_masks
from sft_plugins.preflight.data.documents import with_lengths
from sft_plugins.preflight.data.masked import mask_rows
from sft_plugins.preflight.data.source import Source, check_form, open_data
from sft_plugins.preflight.findings import FAILURES, REMEDIES, Finding, Level
from sft_plugins.preflight.plan import DataEntry, Plan

if TYPE_CHECKING:
    from datasets import Dataset

_FEW = 0.02
"""A smaller share of supervised tokens is worth a look: most often answers are somewhere else than was configured."""


@dataclass(frozen=True, kw_only=True)
class EntryCheck:
    """What was found in one source.

    Attributes:
        masked: the rows as exact masking makes them; None where they came tokenised or as finished text.
    """

    entry: DataEntry
    kind: str
    format: str
    report: MaskReport | None
    masked: Dataset | None
    findings: tuple[Finding, ...]


def check_entry(
    entry: DataEntry,
    plan: Plan,
    tokenizer: Any,
    *,
    stop_token_ids: list[int] | None = None,
    limit: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> EntryCheck:
    """Read, mask and judge `entry`; the first `limit` rows of it.

    Args:
        stop_token_ids: that end answers, where the host says so.

    Raises:
        AssetError: data that cannot be read, or that has no known row form where a template is to render them.
    """
    source = open_data(entry.path, split=entry.split)
    if entry.select is not None:
        source = source.select(entry.select(source.count()))
        if next(source.rows(), None) is None:
            raise AssetError(
                f"{entry.where}: {entry.path} has no row in its shard.", code="no_rows", remedy="Use fewer shards."
            )
    if limit is not None:
        source = source.first(limit)
    if entry.rename is not None:
        source = source.map(entry.rename)
    where = f"{entry.where}: {entry.path}"
    judge = _Judge(entry, plan, where)
    if source.kind == "raw" and entry.text_field and entry.text_field in next(source.rows()):
        return _result(entry, source, None, None, [*judge.plain_text(source, entry.text_field, tokenizer)])
    if source.kind != "raw":
        report = check_masks(map(with_lengths, source.rows()), tokenizer)
        return _result(entry, source, report, None, [*judge.host(source, tokenizer), *judge.faults(report, source)])
    try:
        check_form(source)
        judged = not entry.template_unknown or tokenizer.chat_template
    except AssetError:
        if entry.renders:
            raise
        judged = False  # columns that only the host's own prompt names
    if not judged:
        return _result(entry, source, None, None, [])  # the host's reader has said what is not judged, and why
    masker = PromptMasker(tokenizer, stop_token_ids=stop_token_ids, **_options(entry, plan))
    masked, report = mask_rows(source, masker, advance=advance)
    stops = [judge.finding("warning", "generation_goes_on", note) for note in masker.notes]
    return _result(
        entry, source, report, masked, [*judge.host(source, tokenizer), *stops, *judge.faults(report, source)]
    )


def _result(
    entry: DataEntry, source: Source, report: MaskReport | None, masked: Any, findings: list[Finding]
) -> EntryCheck:
    findings += [
        Finding(level="note", part="data", code="reading", where=entry.where, message=note) for note in source.notes
    ]
    return EntryCheck(
        entry=entry, kind=source.kind, format=source.format, report=report, masked=masked, findings=tuple(findings)
    )


def _options(entry: DataEntry, plan: Plan) -> dict[str, Any]:
    """Of `PromptMasker`: as configured where it is used, and where it is not, cutting as hosts cut, to see what is lost."""
    options: dict[str, Any] = {"max_length": plan.max_length, "chat_template": entry.chat_template, **entry.masking}
    if not entry.exact:
        options |= {"overflow": "truncate", "special_tokens_in_content": "raise", "thinking": "default"}
    return options | {"errors": "drop", "on_history_rewrite": options.get("on_history_rewrite", "split")}


@dataclass(frozen=True)
class _Judge:
    entry: DataEntry
    plan: Plan
    where: str

    def finding(self, level: Level, code: str, message: str, **more: Any) -> Finding:
        more.setdefault("failure", FAILURES.get(code, ""))
        more.setdefault("remedy", REMEDIES.get(code, ""))
        more.setdefault("part", "masking")
        return Finding(level=level, code=code, where=self.where, message=message, **more)

    def faults(self, report: MaskReport, source: Source) -> Iterator[Finding]:
        """What a mask report says, in levels."""
        for code, found in sorted(report.failures.items(), key=lambda item: -item[1].count):
            level: Level = "warning" if self.entry.drops and report.rows_out else "error"
            rows = tuple(dict.fromkeys(found.first_rows))  # several documents of a packed row may share a fault
            unit = "document" if source.kind == "packed" else "row"
            yield self.finding(level, code, found.example, count=found.count, rows=rows, unit=unit)
        if (continued := report.changes.get("continued")) and not self.entry.exact:
            yield self.finding(
                "error", "render_mismatch", "the template does not render these turns behind the prompt of generation.",
                count=continued,
            )  # fmt: skip
        if report.split_rows:
            price = (
                f"{report.split_rows:,} conversations, whose earlier turns the template renders differently as history"
            )
            if self.entry.exact:
                cost = f"{report.repeated_tokens / max(report.tokens, 1):.1%} of the tokens"
                yield self.finding(
                    "note",
                    "history_split",
                    f"{price}, become several rows; {cost} are repeated prompts.",
                    count=report.split_rows,
                )
            else:
                yield self.finding(
                    "error", "history_rewrite", f"{price}: answers would be trained after text that generation never sees.",
                    count=report.split_rows,
                )  # fmt: skip
        if report.unread_keys:
            names = ", ".join(f"{key} (in {count:,})" for key, count in sorted(report.unread_keys.items()))
            yield self.finding("note", "unread_keys", f"keys of rows that the chat template does not look up: {names}.")
        if report.cut_rows:
            cut = not self.entry.exact or self.entry.masking.get("overflow") == "truncate"
            lost = f"{report.lost_supervised_tokens:,} supervised tokens"
            yield self.finding(
                "note" if self.entry.exact else "warning",
                "overflow",
                f"{report.cut_rows:,} rows are longer than {self.plan.max_length:,} tokens; "
                + (
                    f"{lost} are cut off, stop tokens with them." if cut else f"their last turns, {lost}, are left off."
                ),
                count=report.cut_rows,
            )
        if report.rows_out and not report.supervised_share >= _FEW:
            yield self.finding(
                "warning", "few_supervised_tokens", f"only {report.supervised_share:.2%} of the tokens carry loss."
            )

    def host(self, source: Source, tokenizer: Any) -> Iterator[Finding]:
        """What hosts make of rows that they mask themselves, beyond what the rows alone show."""
        if self.entry.exact:
            return
        yield from self.plan.look(self.entry, source, tokenizer)
        if self.entry.trains == "everything" and "messages" in next(source.rows(), {}):
            yield self.finding(
                "warning",
                "prompts_trained",
                f"{self.plan.host} puts loss on whole conversations, prompts and headers too.",
            )
        rows = null_filled(source)
        if rows:
            yield self.finding(
                "warning",
                "null_filled_arguments",
                "tool calls have arguments of different names: columnar loading fills the others with null, and the template "
                "writes them out.",
                part="data",
                count=len(rows),
                rows=tuple(rows[:5]),
            )

    def plain_text(self, source: Source, name: str, tokenizer: Any) -> Iterator[Finding]:
        """Rows of finished text in the column `name`, which no template shapes."""
        yield self.finding(
            "warning", "prompts_trained", f"rows are finished text (`{name}`): every token carries loss, prompts too."
        )
        bos = getattr(tokenizer, "bos_token", None)
        if not bos or (tokenizer("x")["input_ids"] or [None])[0] != tokenizer.bos_token_id:
            return
        twice = [i for i, row in enumerate(source.rows()) if str(row[name]).startswith(bos)]
        if twice:
            yield self.finding(
                "error", "double_bos", f"the text begins with {bos!r}, and the tokenizer adds another.",
                count=len(twice), rows=tuple(twice[:5]),
            )  # fmt: skip


def null_filled(source: Source) -> list[int]:
    """Rows whose tool-call arguments (as objects) lack a name that another row's have, or hold a null for it."""
    names: set[str] = set()
    seen: list[tuple[int, set[str]]] = []
    for index, row in enumerate(source.rows()):
        for message in row.get("messages") or ():
            for call in (message.get("tool_calls") if isinstance(message, Mapping) else None) or ():
                arguments = (call.get("function") or {}).get("arguments")
                if isinstance(arguments, Mapping):
                    present = {name for name, value in arguments.items() if value is not None}
                    names |= set(arguments)
                    seen.append((index, present))
    return sorted({index for index, present in seen if present != names})
