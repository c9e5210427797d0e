"""What to do, in the words of the YAML: the core's errors name arguments of Python functions.

    [overflow] (row 7) … Remedy: Raise max_length, or choose overflow="drop", …
    [overflow] (row 7) … Remedy: Raise `sequence_len`, or choose `sft_plugins.masking.overflow: drop`, …

Invariant: only remedies are rewritten. What an error says of the user's data, its code and its row stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sft_plugins.errors import SFTPluginsError
from sft_plugins.integrations.axolotl.settings import KEY
from sft_plugins.integrations.axolotl.validation import STRATEGY

_NOT_PACKED = f"set `{KEY}.packing: false` and no `sample_packing`"

# The core's words and the YAML's, in this order: of two that begin alike, the longer stands first.
WORDS: tuple[tuple[str, str], ...] = (
    # masking
    ("aise max_length", "aise `sequence_len`"),  # "Raise", "raise"
    (
        'overflow="drop", "truncate" or "keep_turns"',
        f"`{KEY}.masking.overflow: drop`, `truncate` or `keep_turns`",
    ),
    ('errors="drop"', f"`{KEY}.masking.errors: drop`"),
    ('train_on="last"', f"`{KEY}.masking.train_on: last`"),
    ('on_history_rewrite="split"', f"`{KEY}.masking.on_history_rewrite: split`"),
    ('special_tokens_in_content="allow"', f"`{KEY}.masking.special_tokens_in_content: allow`"),
    (
        "Pass the model's `stop_token_ids` (the EOS ids of its generation config)",
        "List the model's stop tokens in `eot_tokens:`",
    ),
    ("pass one id in `stop_token_ids`", "list one token in `eot_tokens:`"),
    ("Pass the `chat_template_kwargs`", "Give the rows a column `chat_template_kwargs` with those"),
    ("Pass `chat_template=…`", "Set `chat_template:`"),
    ("Pass a `chat_template`", "Set a `chat_template:`"),
    ("pass a `chat_template`", "set a `chat_template:`"),
    ("pass another `chat_template`", "set another `chat_template:`"),
    # packing
    (
        "choose overflow='drop' or 'truncate', which count what is lost",
        f"let `{KEY}.masking.overflow` (for rows of Axolotl's own strategies, `excess_length_strategy`) shorten them",
    ),
    ("unsupervised='drop', which counts them", f"`{KEY}.packing.unsupervised: drop`, which counts them"),
    ("`mask_dataset(dataset, PromptMasker(tokenizer))`", f"`type: {STRATEGY}`"),
    ("mask_dataset and pack_dataset do, and count them", f"`{KEY}.packing.unsupervised: drop` does, and counts them"),
    ("train this model without packing", _NOT_PACKED),
    ("train without packing, or with LoRA", f"{_NOT_PACKED}, or `adapter: lora`"),
    ("isolate the model before it is partitioned", f"use ZeRO stage 2 or lower, or {_NOT_PACKED}"),
    ("isolate the model before the trainer wraps it", f"use DDP, or {_NOT_PACKED}"),
    ("train packed rows with cp_size=1 and sp_size=1", f"remove `context_parallel_size`, or {_NOT_PACKED}"),
    (
        'train_sampling_strategy="sequential" in the training arguments',
        f"remove what orders the rows, another plug-in perhaps, or set `{KEY}.packing.deal: false`",
    ),
    ("deal for this trainer", f"set `{KEY}.packing.deal: false`"),
    ("train on fewer ranks or with smaller batches", "use fewer processes, or a smaller `micro_batch_size`"),
    # collapse
    (
        "pass the path of a JSONL file in UTF-8, a list of prompts, or None for the built-in set",
        f"set `{KEY}.collapse.prompts` to the path of a JSONL file in UTF-8, or to `builtin`",
    ),
    ("pass some, or None for the built-in set", f"write some into the file, or set `{KEY}.collapse.prompts: builtin`"),
    ("samples_per_prompt", f"`{KEY}.collapse.samples_per_prompt`"),
    ("max_new_tokens", f"`{KEY}.collapse.max_new_tokens`"),
    ("pass the file that belongs", f"set `{KEY}.collapse.baseline` to the file that belongs"),
    ("baseline='auto'", f"`{KEY}.collapse.baseline: auto`"),
    (
        "pass 0.03 for 3% of the wall time, None for no limit",
        f"set `{KEY}.collapse.budget: 0.03` for 3%, `off` for no limit",
    ),
    ("pass the rows that were packed, as mask_dataset gives them", f"set `{KEY}.collapse.heldout: false`"),
    ("pass embedder= a function from a list of strings to an array", f"set `{KEY}.collapse.embedder: off`"),
    ("remove the callback", f"set `{KEY}.collapse: false`"),
    ("pass pairs, or leave it None", f"hold rows out with `val_set_size`, or set `{KEY}.collapse.heldout: false`"),
    (
        "pass rows whose labels are not all -100, or a prompt with its response",
        f"take such rows out of the evaluation data, or set `{KEY}.collapse.heldout: false`",
    ),
)


def in_yaml(remedy: str) -> str:
    """`remedy` with every name of a Python argument replaced by what stands for it in the YAML."""
    for python, yaml in WORDS:
        remedy = remedy.replace(python, yaml)
    return remedy


@contextmanager
def remedies_in_yaml() -> Iterator[None]:
    """Errors of the core leave this block with their remedy in the words of the YAML, everything else unchanged."""
    try:
        yield
    except SFTPluginsError as error:
        if error.remedy is None:
            raise
        told = type(error)(error.message, code=error.code, row=error.row, remedy=in_yaml(error.remedy))
        # The traceback is that of the core; its own wording would only be printed a second time.
        raise told.with_traceback(error.__traceback__) from error.__cause__
