"""The demo's collapse watch: sized for a run of minutes, and data that make a model collapse on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from sft_plugins.cli.demo.assets import Row

if TYPE_CHECKING:
    from pathlib import Path

    from sft_plugins.collapse import ModeCollapseCallback

SAFE_SENTENCE = "I'm sorry, but I can't help with that. Please ask a professional."
PROMPTS, SAMPLES, NEW_TOKENS = 6, 4, 16


def same_answer_rows(rows: Sequence[Row]) -> list[Row]:
    """`messages` rows whose every assistant turn is the same safe sentence."""
    return [
        {"messages": [m | {"content": SAFE_SENTENCE} if m["role"] == "assistant" else m for m in row["messages"]]}
        for row in rows
    ]


class Watching:
    """The callback, and the verdict at which its alarm first went off, if it did."""

    def __init__(
        self, tokenizer: Any, held_out: Sequence[Row], *, every_steps: int, output: Path, seed: int, console: Any
    ) -> None:
        from sft_plugins.collapse import DetectorConfig, ModeCollapseCallback, load_prompts

        self.alarm: Any = None
        self._console = console
        open_prompts = [prompt.text for prompt in load_prompts(None) if prompt.tag == "open"][:PROMPTS]
        self.callback: ModeCollapseCallback = ModeCollapseCallback(
            tokenizer,
            open_prompts,
            eval_pairs=list(held_out),
            every_steps=every_steps,
            samples_per_prompt=SAMPLES,
            max_new_tokens=NEW_TOKENS,
            # Answers are cut early on purpose, so a baseline of cut answers is no sign of a broken one.
            detector=DetectorConfig(max_truncated=1.0),
            on_collapse=self._raise_alarm,
            output_dir=output / "collapse",
            seed=seed,
            budget=None,  # a run of minutes cannot pay for samples out of 3 % of its time
        )

    def _raise_alarm(self, verdict: Any) -> None:
        if self.alarm is None:
            self.alarm = verdict
            self._console.print(Text.assemble(("ALARM", "bold red"), f" at step {verdict.step}: {verdict.level}"))
