"""Every chat template that TRL ships × every hard conversation: each row is exact, or refused with a justified code.

`python tests/masking/test_template_matrix.py --write docs/template-matrix.md` writes the table,
and `-s` makes pytest print it.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker
from testkit import mask_oracle
from testkit.conversations import CONVERSATIONS, PLAIN, Conversation
from testkit.refusal_reasons import REASONS, reason
from testkit.tokenizers import (
    KINDS,
    LOSSY_KINDS,
    build_tokenizer,
    dump,
    new_templates,
    special_for,
    stop_ids_for_template,
    template_names,
    tokenizer_for_template,
)

# Templates that cannot be exact on the plain conversations, with the reason found by reading them. They must be refused
# there with these codes; the day one becomes exact, a test says so. The third entry is a conversation that is exact.
_THINK = "the generation prompt opens <think>, no switch closes it, and the conversation has no reasoning to put there"
NEVER_EXACT: dict[str, tuple[set[str], str, str | None]] = {
    f"{name}{suffix}": (codes, reason, conversation)
    for suffix in ("", "_training")
    for name, codes, reason, conversation in [
        ("deepseek_r1_distill", {"render_mismatch"}, _THINK, "reasoning_inline"),
        ("deepseekv3", {"render_mismatch"}, _THINK, "reasoning_content"),
    ]
}
MINIMUM_EXACT_SHARE = 0.68  # of all cells; the rest must be refused with reason


@dataclass
class Outcome:
    """One cell. `code` is None for an exact row."""

    code: str | None
    rows: int = 0
    faults: list[str] = field(default_factory=list)
    why: tuple[str, ...] = ()
    told: str = ""  # of the error


def judge(
    tokenizer: Any, row: dict[str, Any], stop_ids: set[int], masker: PromptMasker | None = None, **options: Any
) -> Outcome:
    """Encode `row` and hold the result to the oracle; any other exception than MaskingError passes through."""
    reading = {name: options[name] for name in ("roles", "reasoning") if name in options}
    meant = mask_oracle.meant(tokenizer, row, stop_ids=stop_ids, **reading)
    allowed = mask_oracle.refusals(tokenizer, meant, stop_ids=stop_ids)
    before = copy.deepcopy(row)
    try:
        examples = (masker or PromptMasker(tokenizer, **options)).encode(row)
    except MaskingError as error:
        faults = []
        if error.code not in mask_oracle.CODES:
            faults.append(f"unknown code {error.code!r}")
        if not allowed.codes:
            faults.append(f"refused without need: {error}")
        elif error.code not in allowed.codes:
            faults.append(f"refused with {error.code!r}, not one of {sorted(allowed.codes)} ({allowed.why}): {error}")
        if not error.remedy:
            faults.append(f"no remedy: {error}")
        outcome = Outcome(error.code, faults=faults, why=allowed.why, told=error.message)
    else:
        faults = mask_oracle.violations(tokenizer, meant, examples, stop_ids=stop_ids)
        if allowed.must and not faults:
            faults = [f"made a row that cannot be exact: {allowed.why}"]
        outcome = Outcome(None, rows=len(examples), faults=faults, why=allowed.why)
    if row != before:
        outcome.faults.append("the user's row was changed")
    return outcome


@functools.cache
def outcomes(name: str) -> dict[str, Outcome]:
    """All conversations under template `name`."""
    tokenizer, stop_ids = tokenizer_for_template(name), stop_ids_for_template(name)
    before = dump(tokenizer)
    maskers: dict[str, PromptMasker] = {}  # one for all rows of the same options, as in training
    found = {}
    for conversation in CONVERSATIONS:
        options = conversation.options
        if repr(options) not in maskers:
            maskers[repr(options)] = PromptMasker(tokenizer, **options)
        row = conversation.for_tokenizer(special_for(name))
        found[conversation.name] = judge(tokenizer, row, stop_ids, maskers[repr(options)], **options)
    if dump(tokenizer) != before:
        raise AssertionError("the tokenizer was changed")
    return found


@pytest.mark.parametrize("name", template_names())
def test_every_row_is_exact_or_refused_for_a_reason(name: str) -> None:
    faults = [f"{conversation}: {fault}" for conversation, o in outcomes(name).items() for fault in o.faults]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", template_names())
def test_plain_conversations_are_exact_except_where_the_template_makes_it_impossible(name: str) -> None:
    found = outcomes(name)
    codes = {found[plain].code for plain in PLAIN}
    if name in NEVER_EXACT:
        expected, _, exact_on = NEVER_EXACT[name]
        assert codes <= expected | {None}, f"{name} gives {codes}; a newer TRL may mend it, not break it otherwise"
        assert exact_on is None or found[exact_on].code is None
    else:
        assert codes == {None}


def test_every_refusal_is_wrong_data_or_the_templates_own() -> None:
    cells = [(name, conversation, o.code) for name in template_names() for conversation, o in outcomes(name).items()]
    assert [cell for cell in cells if cell[2] and reason(*cell) is None] == []
    # A reason that explains nothing is out of date, unless an older TRL lacks its template.
    used = {reason(*cell) for cell in cells if cell[2]}
    assert [one.text for one in REASONS if one not in used and set(one.templates or ()) <= set(template_names())] == []


def test_every_template_was_examined() -> None:
    """What a newer TRL brings ends no run before somebody has looked at it, and is named at the end of each."""
    if new := new_templates():
        pytest.skip(f"not examined: {', '.join(new)}; `python {Path(__file__).name} --write` does it")


def test_the_matrix_is_not_passed_by_refusing() -> None:
    """Guard against a vacuous pass: enough templates, enough conversations, and about two of three cells exact."""
    cells = [o for name in template_names() for o in outcomes(name).values()]
    exact = sum(o.code is None for o in cells)
    print("\n" + table())
    assert len(template_names()) >= 45
    assert len(CONVERSATIONS) >= 12
    assert exact >= MINIMUM_EXACT_SHARE * len(cells), f"{exact} of {len(cells)} exact"
    assert set(NEVER_EXACT) & set(template_names()), "the list of exceptions names no installed template"


def test_special_tokens_in_the_data_are_refused_under_every_template() -> None:
    for name in template_names():
        found = outcomes(name)["special_token_in_user"]
        assert found.code is not None
        if name not in NEVER_EXACT:
            assert found.code == "special_token_in_content", name


def test_training_variants_of_a_template_are_no_worse() -> None:
    """Generation markers are not needed: a template without them is exact wherever its marked copy is."""
    for name in template_names():
        if f"{name}_training" in template_names() and name.startswith(("cohere", "gemma", "llama3", "lfm2", "phi3")):
            ours = {c: o.code for c, o in outcomes(name).items()}
            theirs = {c: o.code for c, o in outcomes(f"{name}_training").items()}
            assert ours == theirs, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_is_exact_or_refused(kind: str) -> None:
    """Fast and slow, BPE, SentencePiece and bytes, under plain ChatML."""
    tokenizer = build_tokenizer(kind, eos="<|im_end|>")
    faults, exact = [], 0
    for conversation in CONVERSATIONS:
        if conversation.name in ("text_parts", "several_text_parts"):  # this template concatenates strings
            continue
        row = conversation.for_tokenizer("<|im_end|>")
        found = judge(tokenizer, row, {tokenizer.eos_token_id}, **conversation.options)
        faults += [f"{conversation.name}: {fault}" for fault in found.faults]
        exact += found.code is None
    assert not faults, "\n".join(faults)
    if kind not in LOSSY_KINDS:
        assert exact >= (12 if kind != "unigram" else 6), exact


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def table() -> str:
    lines = [f"{'template':34}{'exact':>6}{'rows':>6}{'refused':>9}  codes"]
    for name in template_names():
        found = outcomes(name)
        codes = collections.Counter(o.code for o in found.values() if o.code)
        rows = sum(o.rows for o in found.values())
        text = ", ".join(f"{code} {count}" for code, count in codes.most_common())
        lines.append(f"{name:34}{len(found) - codes.total():>6}{rows:>6}{codes.total():>9}  {text}")
    return "\n".join(lines)


def _first_sentence(conversation: Conversation) -> str:
    roles = [m["role"][0] for m in conversation.row["messages"]]
    return "".join(roles)


def write(path: Path) -> None:
    """The matrix as Markdown: what holds per template, which conversations are refused and with which code."""
    import transformers
    import trl

    names = sorted(template_names() + new_templates())
    cells = [o for name in names for o in outcomes(name).values()]
    exact = sum(o.code is None for o in cells)
    faults = sum(bool(o.faults) for o in cells)
    lines = [
        "# Template matrix",
        "",
        f"Every template of TRL {trl.__version__} ({len(names)}) × {len(CONVERSATIONS)} conversations, each template",
        "with a tokenizer of its family whose EOS and special tokens are those of the checkpoints, under transformers",
        f"{transformers.__version__}. Checked by `tests/support/testkit/mask_oracle`, which shares no code with the",
        "library.",
        "",
        f"**{exact} of {len(cells)} exact, {len(cells) - exact} refused with a justified code, {faults} wrong.**",
        "Written by `python tests/masking/test_template_matrix.py --write docs/template-matrix.md`.",
        "",
        "| template | exact | rows made | refused | refusals by code |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name in names:
        found = outcomes(name)
        by_code: dict[str, list[str]] = collections.defaultdict(list)
        for conversation, o in found.items():
            if o.code:
                by_code[o.code].append(conversation)
        refused = "; ".join(f"`{code}`: {', '.join(where)}" for code, where in sorted(by_code.items()))
        count = sum(len(where) for where in by_code.values())
        rows = sum(o.rows for o in found.values())
        lines.append(f"| {name} | {len(found) - count} | {rows} | {count} | {refused} |")
    lines += ["", "## Templates that cannot be exact on a plain conversation", ""]
    for name in names:
        if name in NEVER_EXACT:
            _, never, exact_on = NEVER_EXACT[name]
            lines.append(f"- `{name}`: {never}." + (f" Exact on `{exact_on}`." if exact_on else ""))
    lines += [
        "",
        "## What is refused, and why",
        "",
        "| code | cells | conversations | why |",
        "| --- | ---: | --- | --- |",
    ]
    refused_cells = [(name, c, o) for name in names for c, o in outcomes(name).items() if o.code]
    for why in REASONS:
        ours = [c for name, c, o in refused_cells if reason(name, c, o.code or "") is why]
        where = ", ".join(dict.fromkeys(ours))
        lines.append(f"| `{why.code}` | {len(ours)} | {where} | {why.text} |")
    lines += ["", "| exception | templates |", "| --- | --- |"]
    raised: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for name, _, o in refused_cells:
        if o.code == "template_error":
            raised[o.told.partition("): ")[2].replace("|", "\\|")][name] = None
    lines += [f"| {told} | {', '.join(where)} |" for told, where in raised.items()]
    lines += ["", "## Conversations", "", "| name | roles | exact under |", "| --- | --- | ---: |"]
    for conversation in CONVERSATIONS:
        count = sum(outcomes(name)[conversation.name].code is None for name in names)
        lines.append(f"| {conversation.name} | {_first_sentence(conversation)} | {count} of {len(names)} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    print(table())
    if arguments.write:
        write(arguments.write)
    sys.exit(any(o.faults for name in template_names() for o in outcomes(name).values()))
