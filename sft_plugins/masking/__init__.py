"""Loss on exactly the response tokens."""

from sft_plugins.masking.audit import check_masks
from sft_plugins.masking.collator import StrictPromptMaskingCollator
from sft_plugins.masking.dataset import Masked, mask_dataset
from sft_plugins.masking.masker import PromptMasker
from sft_plugins.masking.report import MaskReport
from sft_plugins.masking.turns.labels import MaskedExample

__all__ = [
    "MaskReport",
    "Masked",
    "MaskedExample",
    "PromptMasker",
    "StrictPromptMaskingCollator",
    "check_masks",
    "mask_dataset",
]
