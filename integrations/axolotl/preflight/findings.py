"""What an Axolotl YAML shows by itself: settings against each other, and what of the run is not judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sft_plugins.errors import AssetError
from sft_plugins.integrations.axolotl.preflight.entries import renders, template_of
from sft_plugins.integrations.axolotl.settings import Settings, is_ours
from sft_plugins.integrations.axolotl.validation import contradictions
from sft_plugins.integrations.config_file import KnownKeys, entries_of, keys_findings, number, of_config, switch
from sft_plugins.preflight import Finding

# Roles under the names that Axolotl's own row forms use.
_ROLES = {"assistant", "gpt", "model", "chatgpt", "bot", "user", "human", "system", "tool", "function"}
_CONTEXT_PARALLEL = ("context_parallel_size", "sequence_parallel_degree")
_OTHER_TRAINING = {
    "rl": "preferences (`rl: {}`) are compared, not answered",
    "reward_model": "a reward model is trained",
    "process_reward_model": "a reward model is trained",
    "pretraining_dataset": "rows of running text are streamed, without prompts",
}


def other_training(data: Mapping[str, Any]) -> str | None:
    """The key by which a run is no supervised fine-tuning, whose rows are no business of this check."""
    return next((name for name in _OTHER_TRAINING if data.get(name)), None)


def config_findings(
    data: Mapping[str, Any], settings: Settings | None, path: str, keys: KnownKeys
) -> Iterator[Finding]:
    """Everything that needs no row.

    Raises:
        AssetError: `bad_config` for values that cannot be read.
    """
    for name in (*_CONTEXT_PARALLEL, "tensor_parallel_size"):
        if data.get(name):
            number(data, name, 1, path)  # refuses what could not be compared
    yield from keys_findings(data, keys)
    if settings is not None:
        try:
            yield from contradictions(settings, data)
        except AssetError as error:
            raise AssetError(f"{path}: {error.message}", code=error.code, remedy=error.remedy) from error
    else:
        yield from _context_parallel(data)
    if (other := other_training(data)) is not None:
        yield of_config(
            "warning",
            "not_judged",
            other,
            f"{_OTHER_TRAINING[other].format(data[other])}: such rows and their masks are not looked at.",
            "Nothing, if that is what you train; this check knows supervised fine-tuning.",
            unchecked=f"rows and masks of `{other}`",
        )
        return
    if data.get("streaming"):
        yield of_config(
            "note",
            "not_judged",
            "streaming",
            "rows are streamed: they are read here as they lie on disk, in their order.",
            "",
        )
    if data.get("seed") is None:
        shards = any(entry.get("shards") for entry in entries_of(data, "datasets", path))
        yield of_config(
            "note",
            "no_seed",
            "seed",
            "without one, Axolotl 0.19 shuffles the rows, holds rows out and deals shards otherwise in every run.",
            "Set `seed: 42`.",
            unchecked="which rows are in a shard, which changes with every run" if shards else "",
        )
    for name in ("datasets", "test_datasets"):
        for index, entry in enumerate(entries_of(data, name, path)):
            yield from _entry_findings(entry, f"{name}[{index}]", data)


def _context_parallel(data: Mapping[str, Any]) -> Iterator[Finding]:
    for name in _CONTEXT_PARALLEL:
        if (data.get(name) or 1) > 1 and switch(data, "sample_packing"):
            yield of_config(
                "error",
                "context_parallel",
                name,
                "context parallelism splits packed rows over devices; documents cannot be isolated.",
                f"Remove `{name}`, or `sample_packing`.",
                "P15",
            )


def _entry_findings(entry: Mapping[str, Any], where: str, data: Mapping[str, Any]) -> Iterator[Finding]:
    known = _ROLES | set(entry.get("roles") or {})
    for role in entry.get("roles_to_train") or data.get("roles_to_train") or ():
        if role not in known:
            yield of_config(
                "error",
                "unknown_role",
                f"{where}.roles_to_train",
                f"`{role}` is no role: Axolotl trains nothing for it, and says nothing.",
                "Write `assistant`, or map the role under `roles:`.",
                "M12",
            )
    if str(entry.get("path") or "").startswith("~"):
        yield of_config(
            "error",
            "missing_file",
            f"{where}.path: {entry['path']}",
            "Axolotl does not read `~` as a home folder: it would ask the hub for a data set of that name.",
            "Write the whole path.",
        )
    if not renders(entry):
        kind = entry.get("type")
        yield of_config(
            "warning",
            "not_rendered",
            f"{where}.type: {kind if isinstance(kind, str) else 'a prompt of your own'}",
            "Axolotl writes these prompts in words of its own: the rows can be read, what is trained of them is not judged.",
            "Run `axolotl preprocess`, then `sft-plugins audit` on its dataset_prepared_path.",
            unchecked=f"prompts and masks of {where}",
        )
        return
    if template_of(entry, data)[1]:
        named = entry.get("chat_template") or data.get("chat_template")
        yield of_config(
            "warning",
            "template_not_checked",
            f"{where}: chat_template: {named}",
            "this template comes with Axolotl, and is not to be had here: the tokenizer's own stands in its place, if any.",
            "Run preflight where Axolotl is installed, or set `chat_template: tokenizer_default`.",
            unchecked=f"the template `{named}`",
        )
    if not is_ours(entry) and entry.get("train_on_eos") in ("none", "last"):
        yield of_config(
            "error" if entry["train_on_eos"] == "none" else "warning",
            "missing_stop",
            f"{where}.train_on_eos",
            f"`train_on_eos: {entry['train_on_eos']}` leaves turns whose stop token is not trained: the model will not stop.",
            "Set `train_on_eos: turn`.",
            "M7",
        )
