"""The one line of the log that says what runs, and the warnings beside it.

Invariant: a line never names what this command does not run. `axolotl evaluate` packs nothing and watches nothing,
`inference` and `merge-lora` run nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from sft_plugins import __version__
from sft_plugins.integrations.axolotl.settings import KEY, Settings
from sft_plugins.integrations.axolotl.validation import dataset_entries, field, is_ours, packer

Command = Literal["train", "preprocess", "evaluate", "inference", "merge-lora"]


def active(command: Command, settings: Settings, cfg: Mapping[str, Any]) -> str:
    """`sft-plugins … is active: …`, by which a user knows that the plug-in runs."""
    parts = [_masking(settings, cfg), _packing(command, settings, cfg), _collapse(command, settings)]
    return f"sft-plugins {__version__} is active: {', '.join(parts)}"


def idle(command: Command) -> str:
    """Said by the commands that only load a model."""
    return f"sft-plugins {__version__} takes no part in `axolotl {command}`: nothing is trained or evaluated"


def warnings(command: Command, cfg: Mapping[str, Any], settings: Settings | None = None) -> Iterator[str]:
    """What is allowed, and seldom meant."""
    if settings is not None and settings.packing is None and cfg.get("sample_packing"):
        yield (
            f"sft-plugins: `sample_packing: true` and `{KEY}.packing: false`: nothing proves that packed "
            "documents do not see one another."
        )
    entries = dataset_entries(cfg)
    # Axolotl's rule: the template of the first data set, if its type is `chat_template`; ours it does not know.
    templated = cfg.get("chat_template") or (entries and field(entries[0], "type") == "chat_template")
    if command == "inference" and not templated and any(map(is_ours, entries)):
        yield (
            "sft-plugins: `chat_template` is not set, so `axolotl inference` gives the model your text without a template. "
            "That is how rows of `prompt` and `response` strings are trained; for rows of messages set "
            "`chat_template: tokenizer_default`."
        )


def _masking(settings: Settings, cfg: Mapping[str, Any]) -> str:
    if settings.masking is None:
        return "masking off"
    entries = dataset_entries(cfg)
    ours = sum(map(is_ours, entries))
    return f"masking ({ours} of {len(entries)} datasets masked here, audit: {settings.masking.audit})"


def _packing(command: Command, settings: Settings, cfg: Mapping[str, Any]) -> str:
    who = packer(settings, cfg)
    if who is None:
        return "packing off"
    if command == "preprocess":
        return "packing off (rows are packed when they are trained)"
    if who == "axolotl":
        return "packing (Axolotl's sample_packing, isolated here)"
    if command == "evaluate":
        return "packing (each batch flattened to one row, isolated here)"
    dealt = " and dealt to ranks" if settings.packing is not None and settings.packing.deal else ""
    return f"packing (rows of {cfg['sequence_len']:,} tokens, packed here{dealt})"


def _collapse(command: Command, settings: Settings) -> str:
    if settings.collapse is None:
        return "collapse off"
    if command != "train":
        return "collapse off (nothing is trained)"
    return f"collapse (on_collapse: {settings.collapse.on_collapse})"
