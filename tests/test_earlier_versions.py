"""Collators and maskers that 0.1.0 pickled work; pickles of trees before it name modules that are gone, and Python says so."""

from __future__ import annotations

import base64
import copyreg
import pickle
import zlib
from collections import Counter
from typing import Any

import pytest
import torch

from sft_plugins._rows import RowRules
from sft_plugins.errors import PackingError
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator
from testkit.commands import chat_tokenizer, conversations

# A `BlockDiagonalPackingCollator` of a tiny Llama, as 0.1.0 pickled it.
PACKING = (
    "eNptkL1uU0EQhY3xj64SyREFokhHkzQuoA8SQVjIcWTxAqu5u3vNVdY7q/0xMlIk0lFMgcTQU/IClLwGLwAVXRpEQcEEx5CCKbY4386ZM/O6936v2/lTtJ+arIIri9an"
    "cQB91vrFWKNzkDEy7T92qM+etLBAD26+4cdb/I4PL/icD6hqE4rUome6/z/Hv3wMIbg10+jZVnluA8b8z2tYS4/1hmmwguisWPaXaKxj2jtxsISnGI+hJHAnM0Emr4Nl"
    "GjYOIT98IF3Grlot0m0dClMFOVu/idZLJoDYXKWyRt0gd26EVtuxlUFdlvIl8cF0OL013ZW3n5l2wKG3SjJl4MnR2/m9D1e3HAUbc4m1WF+jznXRwFmQkTztUJXR2Qhe"
    "Ik6Ovv389Obri0sa2KaxOvPk0efzu/Tl4wX1PWab+JCGyWr0Jgn7dfn9x1zc+qp4g3xaaupFfJlk6c1KskgAozKqZXG5Dc4qbPiUdjeqnFW1hmdVl0Yr1FAXB3GtUvvK"
    "8mynW+rxb/hd0SY="
)
# The options of 0.1.0's masker; today's others were none then.
OPTIONS = {
    "train_on": "all", "errors": "raise", "on_history_rewrite": "split", "special_tokens_in_content": "raise",
    "max_length": None, "overflow": "raise", "chat_template": None, "stop_token_ids": None,
}  # fmt: skip


class Written:
    """Pickled as an object of `kind` with this state, whatever objects of that class hold today."""

    def __init__(self, kind: type, **state: Any) -> None:
        self.kind, self.state = kind, state

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg._reconstructor, (self.kind, object, None), self.state  # type: ignore[attr-defined]


def as_pickled_by_010(written: Written) -> bytes:
    """Under 0.1.0's names: the one that has moved since is `RowRules`."""
    data = pickle.dumps(written, protocol=2)
    return data.replace(b"csft_plugins._rows\nRowRules\n", b"csft_plugins.masking.checks\nRowRules\n")


def test_a_masking_collator_of_010_masks_as_one_of_today() -> None:
    tokenizer, rows = chat_tokenizer(), conversations(3)
    rules = {"vocabulary_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "stop_token_ids": None}
    old = Written(
        StrictPromptMaskingCollator,
        tokenizer=tokenizer,
        masker=Written(PromptMasker, tokenizer=tokenizer, options=OPTIONS),
        pad_to_multiple_of=8,
        pad_token_id=tokenizer.pad_token_id,
        dropped=Counter(),
        _rules=Written(RowRules, **rules, supervised=True),
    )
    data = as_pickled_by_010(old)
    assert b"masking.checks" in data  # against a name that is no longer replaced
    made = pickle.loads(data)(rows)
    expected = StrictPromptMaskingCollator(tokenizer, masker=PromptMasker(tokenizer), pad_to_multiple_of=8)(rows)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="no_supervised_tokens"):
        pickle.loads(data)([{"input_ids": [5, 6], "labels": [-100, -100]}])


def test_a_packing_collator_of_010_packs_and_refuses_trees_that_its_proof_never_saw() -> None:
    collator = pickle.loads(zlib.decompress(base64.b64decode(PACKING)))
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}
    batch = collator([row])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 4]
    tree = {"input_ids": [5, 6, 6, 8], "labels": [-100, 6, -100, 8], "seq_lengths": [2, 3]}
    with pytest.raises(PackingError, match="not proved to keep their branches apart") as raised:
        collator([{**tree, "seq_depths": [0, 1], "seq_parents": [-1, 0]}])
    assert raised.value.code == "prefix_trees"


def test_a_pickle_from_before_010_names_a_module_that_is_gone() -> None:
    """Python refuses it before any code of ours runs; `docs/limits.md` says what to do."""
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'sft_plugins\.masking\.encode'"):
        pickle.loads(b"csft_plugins.masking.encode\nPromptMasker\n.")
