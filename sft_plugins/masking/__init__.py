"""Loss on exactly the response tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_plugins import on_demand

if TYPE_CHECKING:
    from sft_plugins.masking.audit import check_masks as check_masks
    from sft_plugins.masking.collator import StrictPromptMaskingCollator as StrictPromptMaskingCollator
    from sft_plugins.masking.dataset import Masked as Masked
    from sft_plugins.masking.dataset import mask_dataset as mask_dataset
    from sft_plugins.masking.masker import PromptMasker as PromptMasker
    from sft_plugins.masking.report import MaskReport as MaskReport
    from sft_plugins.masking.turns.masked import MaskedExample as MaskedExample

    # For the other rooms of this library, which look behind no face; no public names.
    from sft_plugins.masking.dataset import RECORD as RECORD  # isort: skip
    from sft_plugins.masking.dataset import from_records as from_records  # isort: skip
    from sft_plugins.masking.dataset import to_records as to_records  # isort: skip
    from sft_plugins.masking.examples.columns import Reading as Reading  # isort: skip
    from sft_plugins.masking.examples.formats import known_form as known_form  # isort: skip
    from sft_plugins.masking.examples.formats import parse_example as parse_example  # isort: skip
    from sft_plugins.masking.examples.tokenized import MASK_COLUMNS as MASK_COLUMNS  # isort: skip
    from sft_plugins.masking.examples.tokenized import label_arrays as label_arrays  # isort: skip
    from sft_plugins.masking.headers.assistant import assistant_header as assistant_header  # isort: skip
    from sft_plugins.masking.rendering.template import ChatRenderer as ChatRenderer  # isort: skip
    from sft_plugins.masking.turns.tokenizer import TextTokenizer as TextTokenizer  # isort: skip

# Rows are masked without what collates them, which loads torch.
_PUBLIC = {
    "audit": ("check_masks",),
    "collator": ("StrictPromptMaskingCollator",),
    "dataset": ("Masked", "mask_dataset"),
    "masker": ("PromptMasker",),
    "report": ("MaskReport",),
    "turns.masked": ("MaskedExample",),
}
_INNER = {
    "dataset": ("RECORD", "from_records", "to_records"),
    "examples.columns": ("Reading",),
    "examples.formats": ("known_form", "parse_example"),
    "examples.tokenized": ("MASK_COLUMNS", "label_arrays"),
    "headers.assistant": ("assistant_header",),
    "rendering.template": ("ChatRenderer",),
    "turns.tokenizer": ("TextTokenizer",),
}
__all__ = sorted(name for names in _PUBLIC.values() for name in names)
if not TYPE_CHECKING:  # which shall complain of any other name
    __getattr__, __dir__ = on_demand(__name__, _PUBLIC, _INNER)
