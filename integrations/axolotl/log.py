"""What a user of Axolotl reads: the one line that says what runs, warnings beside it, what an audit found, and errors of the
core with their remedies in the words of the YAML.

Invariant: a line never names what this command does not run. `axolotl evaluate` packs nothing and watches nothing,
`inference` and `merge-lora` run nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from axolotl.utils.logging import get_logger

from sft_plugins import __version__
from sft_plugins.errors import MaskingError, SFTPluginsError
from sft_plugins.integrations.axolotl.settings import KEY, STRATEGY, Settings, dataset_entries, field, is_ours, packer
from sft_plugins.masking import MaskReport, check_masks

# Under Axolotl's name: its log filter keeps everybody else's INFO lines back.
LOG = get_logger("axolotl.sft_plugins")
# Options of exact masking can ask for these: turns that are not to be trained, answers cut by `overflow: truncate`.
ASKED_FOR = frozenset({"unsupervised_turn", "missing_stop"})
_NOT_PACKED = f"set `{KEY}.packing: false` and no `sample_packing`"
NAMES = {
    # masking
    "max_length": "`sequence_len`",
    "overflow": f"`{KEY}.masking.overflow: drop`, `truncate` or `keep_turns`",
    "errors": f"`{KEY}.masking.errors: drop`",
    "train_on": f"`{KEY}.masking.train_on: last`",
    "on_history_rewrite": f"`{KEY}.masking.on_history_rewrite: split`",
    "special_tokens_in_content": f"`{KEY}.masking.special_tokens_in_content: allow`",
    "special_token": f"`{KEY}.masking.special_tokens_in_content: [that token]`",
    "reasoning": f"`{KEY}.masking.reasoning: inline` (in front of the answer, in <think> tags) or `drop` (counted)",
    "ignore_columns": f"`{KEY}.masking.ignore_columns`",
    "roles": f"`{KEY}.masking.roles`",
    "stop_tokens": "List the model's stop tokens in `eot_tokens:`",
    "one_stop_token": "list one token in `eot_tokens:`",
    "its_stop_token": "list it in `eot_tokens:`",
    "chat_template_kwargs": "Give the rows a column `chat_template_kwargs` with those",
    "load_tokenizer": "Set `tokenizer_type: PreTrainedTokenizerFast`, and no `tokenizer_use_mistral_common`,",
    "set_chat_template": "Set `chat_template:`",
    "a_chat_template": "set a `chat_template:`",
    "another_chat_template": "set another `chat_template:`",
    # packing
    "shorten": f"let `{KEY}.masking.overflow` (for rows of Axolotl's own strategies, `excess_length_strategy`) shorten them",
    "unsupervised": f"`{KEY}.packing.unsupervised: drop`",
    "unsupervised_dropped": f"`{KEY}.packing.unsupervised: drop` does, and counts them",
    "mask_dataset": f"`type: {STRATEGY}`",
    "no_trees": f"set `{KEY}.packing.share_prefixes: false`",
    "no_packing": _NOT_PACKED,
    "no_packing_or_lora": f"{_NOT_PACKED}, or `adapter: lora`",
    "whole_weights": f"use ZeRO stage 2 or lower, or {_NOT_PACKED}",
    "no_wrapping": f"use DDP, or {_NOT_PACKED}",
    "whole_rows": f"remove `context_parallel_size`, or {_NOT_PACKED}",
    "no_other_order": f"remove what orders the rows, another plug-in perhaps, or set `{KEY}.packing.deal: false`",
    "no_deal": f"set `{KEY}.packing.deal: false`",
    "smaller_steps": "use fewer processes, or a smaller `micro_batch_size`",
    # collapse
    "prompts": f"set `{KEY}.collapse.prompts` to the path of a JSONL file in UTF-8, or to `builtin`",
    "some_prompts": f"write some into the file, or set `{KEY}.collapse.prompts: builtin`",
    "samples_per_prompt": f"`{KEY}.collapse.samples_per_prompt`",
    "max_new_tokens": f"`{KEY}.collapse.max_new_tokens`",
    "baseline": f"`{KEY}.collapse.baseline: auto`",
    "baseline_file": f"set `{KEY}.collapse.baseline` to the file",
    "embedder": f"set `{KEY}.collapse.embedder: off`",
    "budget": f"set `{KEY}.collapse.budget: 0.03` for 3%, `off` for no limit",
    "packed_heldout": f"set `{KEY}.collapse.heldout: false`",
    "no_heldout": f"hold rows out with `val_set_size`, or set `{KEY}.collapse.heldout: false`",
    "heldout_rows": f"take such rows out of the evaluation data, or set `{KEY}.collapse.heldout: false`",
    "no_watch": f"set `{KEY}.collapse: false`",
}
"""What the core's remedies name → what stands for it in the YAML."""

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


def audit_rows(dataset: Any, tokenizer: Any, *, name: str, level: str, ours: bool) -> MaskReport | None:
    """Check every row of `dataset` and log what was found.

    Args:
        name: what the rows are called in the log.
        level: `error`, `warn` or `off`.
        ours: whether every row comes from our own strategy, which has checked stops and turns already.

    Raises:
        MaskingError: `audit`, under `level="error"`.
    """
    if level == "off" or dataset is None:
        return None
    report = check_masks(dataset, tokenizer)
    if ours:
        report.failures = {code: found for code, found in report.failures.items() if code not in ASKED_FOR}
    stops = ", ".join(report.stop_tokens) or "nothing"
    LOG.info(
        f"sft-plugins audit of {name} rows: {report.rows_in:,} rows, {report.supervised_share:.1%} of {report.tokens:,} tokens "
        f"carry loss in {report.supervised_runs:,} answers, which end on {stops}; "
        f"{sum(found.count for found in report.failures.values()):,} faults"
    )
    if report.ok:
        return report
    summary = "; ".join(
        f"{code} in {found.count:,} rows (first {', '.join(map(str, found.first_rows))}): {found.example}"
        for code, found in report.failures.items()
    )
    if level == "error":
        raise MaskingError(
            f"the {name} rows are not masked exactly: {summary}",
            code="audit",
            remedy="Mask them with `type: sft_plugins.integrations.axolotl.strategy`, correct the dataset's settings, or "
            f"set `{KEY}.masking.audit: warn`.",
        )
    LOG.warning(f"sft-plugins audit: {summary}\n{report}")
    return report


@contextmanager
def in_yaml() -> Iterator[None]:
    """Errors of the core leave this block with their remedy in the words of the YAML, everything else unchanged."""
    try:
        yield
    except SFTPluginsError as error:
        # The traceback is that of the core; its own wording would only be printed a second time.
        raise error.in_words(NAMES).with_traceback(error.__traceback__) from error.__cause__
