"""A second witness: turn by turn, our labels beside the masks of the package `renderers`, where it has the template's family.

    python -m venv .venv-witness && .venv-witness/bin/pip install . trl 'renderers[transformers]' pytest hypothesis
    .venv-witness/bin/python tests/witness/compare_renderers.py --write docs/second-witness.md

A turn is compared alone: what comes before the last trained run of the conversation up to it, and the run itself. Our mode
of the template is given to the renderer, which has one mode per run. `CAUSES` says who is right where the two differ.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.metadata
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import renderers
import transformers
import trl
from renderers.base import build_training_sample

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker
from sft_plugins.masking.turns.reasoning import first_difference
from testkit.conversations import BY_NAME
from testkit.mask_oracle import decode, runs, trainable
from testkit.tokenizers import stop_ids_for_template, template_names, tokenizer_for_template

FAMILIES = {
    "qwen3": renderers.Qwen3RendererConfig, "qwen3_vl": renderers.Qwen3VLRendererConfig,
    "qwen3_5_think": renderers.Qwen35RendererConfig, "qwen3_6": renderers.Qwen36RendererConfig,
    "qwen3_8": renderers.Qwen38RendererConfig, "glm4moe": renderers.GLM45RendererConfig,
    "llama3_1": renderers.Llama3RendererConfig,
    "deepseek_r1_distill": renderers.DeepSeekR1RendererConfig, "deepseekv3": renderers.DeepSeekR1RendererConfig,
    "nemotron_3_nano": renderers.Nemotron3RendererConfig, "nemotron_3_super": renderers.Nemotron3RendererConfig,
    "nemotron_3_ultra": renderers.Nemotron3UltraRendererConfig,
    "nemotron_3_5_lightning": renderers.Nemotron35RendererConfig, "gemma4_v5": renderers.Gemma4RendererConfig,
}  # fmt: skip
CONVERSATIONS = (
    "one_turn", "many_turns", "system", "multi_line", "unicode", "code", "whitespace_at_ends", "reasoning_content",
    "reasoning_inline", "thinking_off", "consecutive_assistants", "tools", "tools_with_text_and_two_calls", "tool_call_last",
    "reasoning_with_tools", "greeting_after_system",
)  # fmt: skip


# How the two may part, and who is right by what generation is given: the ids of `apply_chat_template` before the turn.
CAUSES = {
    "same": "every id of the prompt and of the answer, and the place where the loss begins",
    "start": "the same row; the loss begins elsewhere. The generation prompt of `renderers` itself ends where ours does: it "
    "trains what that prompt supplies (`<think></think>`), or leaves out a newline that the model has to write. Ours is asked",
    "stop": "the same row, and another of the ids that stop generation at its end",
    "start and stop": "as `start`; and a last GLM turn ends on `<|endoftext|>` there, on `<|user|>` here, as every earlier "
    "turn does in the template. Generation stops at both",
    "ids": "the same text in other ids: `renderers` tokenises a text and the call behind it apart, or over the end of the "
    "prompt. Here the prompt has the ids that generation is given, and the answer those of its text",
    "prompt": "the same row, and another generation prompt",
    "answer": "the turn's own text: `renderers` drops reasoning of DeepSeek-R1's that its prompt opens a thought for, writes "
    "calls otherwise than the template (GLM), or trains two answers as one turn where the template merges them (Gemma 4)",
    "history": "earlier turns: with thinking off `renderers` keeps their empty thoughts, which the template strips; its "
    "documentation says that it departs from the template there; or earlier calls, as in `answer`. Ours is the template's",
    "renderers refuses": "no mask to compare: messages or switches that it does not take",
    "we refuse": "no row of ours to compare: reasoning that the template does not know, a thought that nothing closes, the "
    "template's own exception",
}


class Turn(NamedTuple):
    """Ids before the trained ones, and the trained ones."""

    prompt: list[int]
    trained: list[int]


def ours(tokenizer: Any, masker: PromptMasker, row: dict[str, Any], k: int) -> tuple[Turn, dict[str, bool]] | str:
    """The turn at `k` and its mode, or the code of the refusal."""
    messages = row["messages"][: k + 1]
    try:
        rows = masker.encode({**row, "messages": messages})
    except MaskingError as error:
        return error.code
    last = rows[-1]
    start, end = runs(last.labels)[-1]
    named = next(iter(last.modes[-1:]), "")
    mode = {name: value == "True" for name, _, value in [named.partition("=")] if value}
    return Turn(list(last.input_ids[:start]), list(last.input_ids[start:end])), mode


def theirs(
    tokenizer: Any, family: Any, row: dict[str, Any], k: int, mode: dict[str, bool]
) -> tuple[Turn, list[int]] | str:
    """The turn at `k`, and the ids that the renderer gives generation before it; or its refusal."""
    known = family.template_field_names() if hasattr(family, "template_field_names") else family._template_fields
    kwargs = {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if name in known}
    try:
        renderer = renderers.create_renderer(tokenizer, family(**kwargs, **mode))
        tools = row.get("tools")
        asked = renderer.render_ids(row["messages"][:k], tools=tools, add_generation_prompt=True)
        sample = build_training_sample(renderer, row["messages"][: k + 1], tools=tools, ensure_final_stop=True)
    except Exception as error:  # whatever a renderer throws is its refusal
        return f"{type(error).__name__}: {error}".partition("\n")[0][:90]
    trained = [index for index, flag in enumerate(sample.loss_mask) if flag]
    if not trained:
        return "trains nothing"
    start = end = trained[-1] + 1
    while start and sample.loss_mask[start - 1]:
        start -= 1
    return Turn(sample.token_ids[:start], sample.token_ids[start:end]), asked


def ready_tokenizer(name: str) -> Any:
    """The template's tokenizer, with the tokens that the renderer asks for and our small vocabulary lacks."""
    tokenizer = tokenizer_for_template(name)
    for _ in range(40):
        try:
            renderers.create_renderer(tokenizer, FAMILIES[name]())
        except AssertionError as error:
            missing = re.search(r"Special token '(.+)' not found", str(error))
            if missing is None:
                raise
            tokenizer.add_tokens([missing[1]])
        else:
            break
    return tokenizer


def outcome(tokenizer: Any, turn: Turn, other: Turn, asked: list[int]) -> tuple[str, str]:
    """A key of `CAUSES`, and the texts where the two part."""
    if other == turn:
        return "same", ""
    if [*turn.prompt, *turn.trained[:-1]] == [*other.prompt, *other.trained[:-1]]:
        parts = (["start"] if len(turn.prompt) != len(other.prompt) else []) + (
            ["stop"] if turn.trained[-1] != other.trained[-1] else []
        )
        if "start" in parts and asked != turn.prompt:
            return "prompt", difference(tokenizer, turn.prompt, asked)
        return " and ".join(parts), difference(tokenizer, turn.trained, other.trained)
    whole, theirs_whole = ([*one.prompt, *one.trained] for one in (turn, other))
    if decode(tokenizer, whole) == decode(tokenizer, theirs_whole):
        return "ids", ""
    if decode(tokenizer, turn.prompt) == decode(tokenizer, asked):
        return "answer", difference(tokenizer, turn.trained, other.trained)
    return "history", difference(tokenizer, turn.prompt, asked)


def compare(name: str) -> list[tuple[str, int, str, str]]:
    """(conversation, turn, outcome, detail) of every trained turn."""
    tokenizer = ready_tokenizer(name)
    masker = PromptMasker(tokenizer, stop_token_ids=sorted(stop_ids_for_template(name)))
    found = []
    for conversation in CONVERSATIONS:
        row = BY_NAME[conversation].for_tokenizer("")
        for k in trainable(row["messages"]):
            mine = ours(tokenizer, masker, row, k)
            if isinstance(mine, str):
                found.append((conversation, k, "we refuse", mine))
                continue
            other = theirs(tokenizer, FAMILIES[name], row, k, mine[1])
            if isinstance(other, str):
                found.append((conversation, k, "renderers refuses", other))
            else:
                found.append((conversation, k, *outcome(tokenizer, mine[0], *other)))
    return found


def difference(tokenizer: Any, one: list[int], two: list[int]) -> str:
    """The two texts from a little before the place where they part."""
    mine, other = decode(tokenizer, one), decode(tokenizer, two)
    same = first_difference(mine, other)
    start = max(0, same - 12)
    return f"ours {mine[start : same + 40]!r}, renderers {other[start : same + 40]!r}"


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--verbose", action="store_true", help="print every difference")
    arguments = parser.parse_args()
    counts: dict[str, collections.Counter[str]] = {}
    details: dict[tuple[str, str, str], str] = {}
    for name in FAMILIES:
        if name not in template_names():
            continue
        found = compare(name)
        counts[name] = collections.Counter(outcome for _, _, outcome, _ in found)
        print(name, dict(counts[name]), flush=True)
        for conversation, k, outcome, detail in found:
            if outcome != "same":
                details.setdefault((name, conversation, outcome), f"turn {k}: {detail}")
                if arguments.verbose:
                    print("   ", conversation, k, outcome, detail, flush=True)
    if arguments.write:
        arguments.write.write_text(page(counts, details), encoding="utf-8")


def page(counts: dict[str, collections.Counter[str]], details: dict[tuple[str, str, str], str]) -> str:
    seen = [cause for cause in CAUSES if any(count[cause] for count in counts.values())]
    turns = sum(count.total() for count in counts.values())
    lines = [
        "# A second witness: the package `renderers`",
        "",
        f"`renderers` {importlib.metadata.version('renderers')} writes chat templates anew as Python, with a mask of what the "
        f"model samples. Its masks beside ours, turn by turn, on {len(CONVERSATIONS)} conversations: {turns} turns under "
        f"{len(counts)} templates of TRL {trl.__version__}, transformers {transformers.__version__}, "
        f"{datetime.date.today().isoformat()}. Where the two differ, the ids that generation is given decide "
        "(`render_ids(add_generation_prompt=True)` there, `apply_chat_template` here). gpt-oss is not compared: its renderer "
        "downloads a vocabulary.",
        "",
        "Written by `python tests/witness/compare_renderers.py --write docs/second-witness.md`, in an environment of its own.",
        "",
        "| template | " + " | ".join(seen) + " |",
        "| --- |" + " ---: |" * len(seen),
        *(f"| {name} | " + " | ".join(str(count[cause]) for cause in seen) + " |" for name, count in counts.items()),
        "",
        "| outcome | what it is, and who is right | first example |",
        "| --- | --- | --- |",
    ]
    for cause in seen:
        examples = [(key, text) for key, text in details.items() if key[2] == cause]
        first = ""
        if examples:
            (name, conversation, _), example = examples[0]
            first = f"{name}, {conversation}, {example}".replace("|", "\\|").replace("<", "&lt;")
        told = CAUSES[cause].replace("|", "\\|")
        lines.append(f"| {cause} | {told} | {first} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
