"""Loss on exactly the response tokens."""

from sft_plugins.masking.audit import check_masks
from sft_plugins.masking.collator import StrictPromptMaskingCollator
from sft_plugins.masking.dataset import Masked, mask_dataset
from sft_plugins.masking.masker import PromptMasker
from sft_plugins.masking.report import MaskReport
from sft_plugins.masking.turns.masked import MaskedExample

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

__all__ = [
    "MaskReport",
    "Masked",
    "MaskedExample",
    "PromptMasker",
    "StrictPromptMaskingCollator",
    "check_masks",
    "mask_dataset",
]
