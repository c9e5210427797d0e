"""The dataset strategy `type: sft_plugins.integrations.axolotl.strategy`: raw rows → rows masked by `PromptMasker`.

Invariant: the rows that Axolotl stores and trains on are those of `mask_dataset`, with columns of the types that Axolotl's
own strategies give, so that data sets of both kinds can be merged.
"""

from __future__ import annotations

from typing import Any

from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from datasets import Dataset, Features, List, Value

from sft_plugins.errors import MaskingError
from sft_plugins.integrations.axolotl.fields import RowFields
from sft_plugins.integrations.axolotl.log import LOG, in_yaml
from sft_plugins.integrations.axolotl.settings import KEY, Settings, stop_token_ids
from sft_plugins.masking import PromptMasker, mask_dataset

FEATURES = Features(
    {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8")), "labels": List(Value("int64"))}
)


def load(tokenizer: Any, cfg: Any, ds_cfg: Any) -> MaskingStrategy:
    """What Axolotl calls for every dataset of this type.

    Raises:
        MaskingError: `bad_option`, where a setting contradicts exact masking or the plug-in is not active.
    """
    if cfg.get(KEY) is None:
        raise MaskingError(
            "a dataset has `type: sft_plugins.integrations.axolotl.strategy`, but the plug-in is not active.",
            code="bad_option",
            remedy="Add `- sft_plugins.integrations.axolotl.SFTPlugin` to `plugins:`.",
        )
    with in_yaml():
        return MaskingStrategy(build_masker(tokenizer, cfg, ds_cfg), RowFields.of(ds_cfg))


def build_masker(tokenizer: Any, cfg: Any, ds_cfg: Any) -> PromptMasker:
    """The masker that a YAML asks for."""
    settings = Settings.read(cfg[KEY].to_dict()).masking
    assert settings is not None  # refused at validation
    template = None  # Axolotl has already put the global `chat_template` on the tokenizer
    if ds_cfg.get("chat_template"):
        template = get_chat_template_from_config(cfg=cfg, ds_cfg=ds_cfg, tokenizer=tokenizer)
    return PromptMasker(
        tokenizer,
        max_length=cfg["sequence_len"],
        chat_template=template,
        stop_token_ids=stop_token_ids(tokenizer, cfg.get("eot_tokens") or ()),
        **settings.model_dump(exclude={"audit"}),
    )


class MaskingStrategy(DatasetWrappingStrategy):
    """Masks a whole data set at once."""

    def __init__(self, masker: PromptMasker, fields: RowFields) -> None:
        self.masker, self.fields = masker, fields

    def wrap_dataset(
        self,
        dataset: Dataset,
        process_count: int | None = None,
        keep_in_memory: bool | None = False,
        **_: Any,
    ) -> Dataset:
        """Mask `dataset`; the report is logged."""
        processes = process_count if process_count and process_count > 1 and len(dataset) > 1 else None
        if not self.fields.change_nothing:
            dataset = dataset.map(
                self.fields.rename,
                remove_columns=dataset.column_names,
                keep_in_memory=bool(keep_in_memory),
                desc="Renaming fields",
            )
        with in_yaml():
            masked, report = mask_dataset(dataset, self.masker, num_proc=processes)
        LOG.info("sft-plugins masked a dataset:\n%s", report)
        if not len(masked):
            raise MaskingError(
                f"none of the {report.rows_in:,} rows could be masked.",
                code="empty_dataset",
                remedy="See the report above; `sft_plugins.masking.errors: raise` stops at the first.",
            )
        return masked.map(_with_attention_mask, batched=True, features=FEATURES, desc="Casting")


def _with_attention_mask(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    return {**batch, "attention_mask": [[1] * len(ids) for ids in batch["input_ids"]]}
