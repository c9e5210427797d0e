"""`StrictPromptMaskingCollator`: golden batches, every form of row, and an error that names the row for every bad one."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator
from testkit.conversations import TemplateKnobs, assistant, user
from testkit.mask_oracle import IGNORE
from testkit.tokenizers import build_tokenizer, dump

KEYS = {"input_ids", "labels", "attention_mask"}


@functools.cache
def tokenizer_of(pad: str | None = "<|pad|>") -> Any:
    return build_tokenizer("qwen", pad=pad)


def same(batch: dict[str, torch.Tensor], **expected: list[list[int]]) -> None:
    assert set(batch) == KEYS == set(expected)
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], torch.tensor(values)), name


def test_golden_batch_where_pad_is_eos() -> None:
    """The EOS that ends a row keeps its label and its attention; the same id as padding has neither."""
    tokenizer = tokenizer_of("eos")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    rows = [
        {"input_ids": [5, 6, 7, 8, eos], "labels": [IGNORE, IGNORE, 7, 8, eos]},
        {"input_ids": [8, eos, eos], "labels": [IGNORE, IGNORE, eos]},  # an EOS within the prompt as well
    ]
    same(
        StrictPromptMaskingCollator(tokenizer)(rows),
        input_ids=[[5, 6, 7, 8, eos], [8, eos, eos, eos, eos]],
        labels=[[IGNORE, IGNORE, 7, 8, eos], [IGNORE, IGNORE, eos, IGNORE, IGNORE]],
        attention_mask=[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
    )


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (1, 3), (2, 4), (3, 3), (8, 8)])
def test_golden_batch_padded_to_a_multiple(multiple: int | None, width: int) -> None:
    tokenizer = tokenizer_of()
    pad, more = tokenizer.pad_token_id, width - 3
    rows = [{"input_ids": [5, 6], "labels": [IGNORE, 6]}, {"input_ids": [7, 8, 9], "labels": [IGNORE, IGNORE, 9]}]
    same(
        StrictPromptMaskingCollator(tokenizer, pad_to_multiple_of=multiple)(rows),
        input_ids=[[5, 6, pad] + [pad] * more, [7, 8, 9] + [pad] * more],
        labels=[[IGNORE, 6, IGNORE] + [IGNORE] * more, [IGNORE, IGNORE, 9] + [IGNORE] * more],
        attention_mask=[[1, 1, 0] + [0] * more, [1, 1, 1] + [0] * more],
    )


@pytest.mark.parametrize("multiple", [0, -8, 2.0, "8"])
def test_a_multiple_that_is_no_positive_int_is_refused(multiple: Any) -> None:
    with pytest.raises(MaskingError, match="pad_to_multiple_of") as caught:
        StrictPromptMaskingCollator(tokenizer_of(), pad_to_multiple_of=multiple)
    assert caught.value.code == "bad_option"


@pytest.mark.parametrize(
    "form",
    [list, tuple, np.array, torch.tensor, functools.partial(np.array, dtype=np.int32),
     functools.partial(torch.tensor, dtype=torch.int32), functools.partial(np.array, dtype=np.uint16)],
    ids=["list", "tuple", "numpy", "torch", "numpy_int32", "torch_int32", "ids_as_uint16"],
)  # fmt: skip
def test_rows_come_as_lists_arrays_or_tensors_of_any_integer_type(form: Any) -> None:
    ids, labels = [5, 6, 7], [IGNORE, 6, 7]
    as_labels = (
        form(labels) if not (isinstance(form, functools.partial) and form.keywords["dtype"] == np.uint16) else labels
    )
    rows = [{"input_ids": form(ids), "labels": as_labels}, {"input_ids": form(ids[:2]), "labels": as_labels[:2]}]
    pad = tokenizer_of().pad_token_id
    same(
        StrictPromptMaskingCollator(tokenizer_of())(rows),
        input_ids=[ids, [5, 6, pad]],
        labels=[labels, [IGNORE, 6, IGNORE]],
        attention_mask=[[1, 1, 1], [1, 1, 0]],
    )


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({"completion_mask": [0, 0, 1, 1]}, [IGNORE, IGNORE, 7, 8]),
        ({"assistant_masks": [0, 1, 0, 1]}, [IGNORE, 6, IGNORE, 8]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]}, [IGNORE, IGNORE, IGNORE, 8]),
        ({"labels": [IGNORE, 6, 7, IGNORE], "completion_mask": [0, 0, 1, 1]}, [IGNORE, IGNORE, 7, IGNORE]),
        ({"labels": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]},
         [IGNORE, 6, IGNORE, 8]),
        ({"labels": None, "completion_mask": [0, 0, 0, 1]}, [IGNORE, IGNORE, IGNORE, 8]),
        ({"completion_mask": [False, False, True, True], "token_type_ids": [0, 0, 0, 0]}, [IGNORE, IGNORE, 7, 8]),
    ],
)  # fmt: skip
def test_a_token_carries_loss_where_every_column_says_so(columns: dict[str, Any], labels: list[int]) -> None:
    batch = StrictPromptMaskingCollator(tokenizer_of())([{"input_ids": [5, 6, 7, 8], **columns}])
    same(batch, input_ids=[[5, 6, 7, 8]], labels=[labels], attention_mask=[[1, 1, 1, 1]])


def test_rows_that_were_padded_before_lose_their_padding_by_position() -> None:
    eos = tokenizer_of("eos").eos_token_id
    left = {"input_ids": [eos, eos, 5, 6, eos], "labels": [IGNORE] * 3 + [6, eos], "attention_mask": [0, 0, 1, 1, 1]}
    right = {"input_ids": [5, eos, eos, eos], "labels": [IGNORE, eos, IGNORE, IGNORE], "attention_mask": [1, 1, 0, 0]}
    same(
        StrictPromptMaskingCollator(tokenizer_of("eos"))([left, right]),
        input_ids=[[5, 6, eos], [5, eos, eos]],
        labels=[[IGNORE, 6, eos], [IGNORE, eos, IGNORE]],
        attention_mask=[[1, 1, 1], [1, 1, 0]],
    )


def test_raw_rows_are_masked_on_the_fly_and_a_split_conversation_becomes_several_rows() -> None:
    tokenizer = build_tokenizer("qwen", chat_template=TemplateKnobs(reasoning="strip_history").jinja())
    masker = PromptMasker(tokenizer)
    split = {
        "messages": [
            user("6 * 7?"),
            assistant("42.", reasoning_content="Six sevens."),
            user("6 * 8?"),
            assistant("48.", reasoning_content="Six more."),
        ]
    }
    raw = [{"messages": [user("Hi"), assistant("Yes.")]}, split, {"prompt": "2 + 2 =", "response": " 4"}]
    made = [example for row in raw for example in masker.encode(row)]
    assert [len(masker.encode(row)) for row in raw] == [1, 2, 1]
    batch = StrictPromptMaskingCollator(tokenizer, masker=masker)(raw)
    tokenised = [{"input_ids": one.input_ids, "labels": one.labels} for one in made]
    expected = StrictPromptMaskingCollator(tokenizer)(tokenised)
    assert batch["input_ids"].shape[0] == 4
    same(batch, **{name: value.tolist() for name, value in expected.items()})
    mixed = StrictPromptMaskingCollator(tokenizer, masker=masker)([raw[0], *tokenised[1:3], raw[2]])
    same(mixed, **{name: value.tolist() for name, value in expected.items()})


GOOD = {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}
BAD: dict[str, tuple[Any, str, str]] = {
    "labels too short": ({"input_ids": [5, 6, 7], "labels": [IGNORE, 6]}, "length_mismatch", "labels"),
    "mask too short": ({"input_ids": [5, 6, 7], "completion_mask": [0, 1]}, "length_mismatch", "completion_mask"),
    "mask too long": ({"input_ids": [5, 6], "assistant_masks": [0, 1, 1]}, "length_mismatch", "assistant_masks"),
    "negative id": (
        {"input_ids": [5, -1, 7], "labels": [IGNORE, IGNORE, 7]},
        "id_out_of_range",
        r"input_ids\[1\] = -1",
    ),
    "id too large": ({"input_ids": [5, 6, 10**6], "labels": [IGNORE, 6, IGNORE]}, "id_out_of_range", "1000000"),
    "shifted labels": ({"input_ids": [5, 6, 7], "labels": [IGNORE, 7, 5]}, "label_mismatch", r"labels\[1\] = 7"),
    "first label": ({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, "first_label", "first token"),
    "nothing supervised": ({"input_ids": [5, 6], "labels": [IGNORE, IGNORE]}, "no_supervised_tokens", "2 tokens"),
    "empty": ({"input_ids": [], "labels": []}, "no_supervised_tokens", "0 tokens"),
    "packed": ({**GOOD, "seq_lengths": [2, 1]}, "already_packed", "seq_lengths"),
    "no labels": ({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, "bad_schema", "carry loss"),
    "raw without a masker": ({"prompt": "a", "response": "b"}, "bad_schema", "'prompt', 'response'"),
    "no mapping": ([5, 6, 7], "bad_schema", "list"),
    "nested ids": ({"input_ids": [[5, 6]], "labels": [[5, 6]]}, "bad_schema", "2 dimensions"),
    "ragged ids": ({"input_ids": [5, [6]], "labels": [IGNORE, 6]}, "bad_schema", "input_ids"),
    "fractions": ({"input_ids": [5.0, 6.0], "labels": [IGNORE, 6]}, "bad_schema", "float64"),
    "mask of twos": ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "bad_schema", "at position 1 it holds 2"),
    "hole in attention": (
        {**GOOD, "attention_mask": [1, 0, 1]},
        "bad_schema",
        "zeros between ones, the first at position 1",
    ),
    "mere padding": ({**GOOD, "attention_mask": [0, 0, 0]}, "bad_schema", "holds no 1"),
}


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("name", BAD)
def test_every_bad_row_is_named(name: str, position: int) -> None:
    row, code, match = BAD[name]
    rows: list[Any] = [GOOD, GOOD, GOOD]
    rows[position] = row
    with pytest.raises(MaskingError, match=match) as caught:
        StrictPromptMaskingCollator(tokenizer_of())(rows)
    assert (caught.value.code, caught.value.row) == (code, position)
    assert caught.value.remedy


def test_two_bos_are_refused() -> None:
    tokenizer = build_tokenizer("llama3")
    bos = tokenizer.bos_token_id
    with pytest.raises(MaskingError, match="twice") as caught:
        StrictPromptMaskingCollator(tokenizer)([GOOD, {"input_ids": [bos, bos, 7], "labels": [IGNORE, IGNORE, 7]}])
    assert (caught.value.code, caught.value.row) == ("double_bos", 1)


def test_a_raw_row_that_cannot_be_masked_is_named() -> None:
    masker = PromptMasker(tokenizer_of())
    bad = {"messages": [user("Hi"), {"role": "wizard", "content": "b"}]}
    with pytest.raises(MaskingError, match="wizard") as caught:
        StrictPromptMaskingCollator(tokenizer_of(), masker=masker)([GOOD, bad])
    assert (caught.value.code, caught.value.row) == ("bad_schema", 1)


def test_raw_rows_that_the_masker_drops_are_counted_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    wizard = {"messages": [user("a"), {"role": "wizard", "content": "b"}]}
    raw = {"messages": [user("a"), assistant("b")]}
    collate = StrictPromptMaskingCollator(tokenizer_of(), masker=PromptMasker(tokenizer_of(), errors="drop"))
    for batch in ([raw, wizard], [wizard, raw, {"messages": [user("a"), assistant("")]}], [raw, raw]):
        assert len(collate(batch)["labels"]) == batch.count(raw)
    assert collate.dropped == {"bad_schema": 2, "empty_response": 1}
    assert [record.getMessage().count("wizard") for record in caplog.records] == [1, 0]
    assert "(row 1)" in caplog.messages[0]


def test_a_batch_of_which_everything_is_dropped_is_an_error_not_an_empty_batch() -> None:
    collate = StrictPromptMaskingCollator(tokenizer_of(), masker=PromptMasker(tokenizer_of(), errors="drop"))
    bad = {"messages": [user("Hi")]}
    with pytest.raises(MaskingError, match="batch of 2 rows"):
        collate([bad, bad])
    assert collate([bad, GOOD])["input_ids"].shape == (1, 3)
    with pytest.raises(MaskingError, match="batch of 0 rows"):
        collate([])


def test_the_collator_travels() -> None:
    tokenizer = tokenizer_of()
    raw = [{"messages": [user("Hi"), assistant("Yes.")]}, {"messages": [user("Hi"), assistant("Yes, and more.")]}]
    collate = StrictPromptMaskingCollator(tokenizer, masker=PromptMasker(tokenizer), pad_to_multiple_of=4)
    again = pickle.loads(pickle.dumps(collate))
    same(again(raw), **{name: value.tolist() for name, value in collate(raw).items()})


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers_make_the_same_batches(context: str) -> None:
    tokenizer = tokenizer_of("eos")
    raw = [{"messages": [user("Hi"), assistant("Yes" + "!" * i)]} for i in range(7)]
    collate = StrictPromptMaskingCollator(tokenizer, masker=PromptMasker(tokenizer))
    here = list(DataLoader(raw, batch_size=2, collate_fn=collate))  # type: ignore[arg-type]
    there = list(
        DataLoader(raw, batch_size=2, collate_fn=collate, num_workers=2, multiprocessing_context=context)  # type: ignore[arg-type]
    )
    assert len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        same(other, **{name: value.tolist() for name, value in one.items()})


def test_an_error_in_a_worker_still_says_what_and_where() -> None:
    rows = [GOOD, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    loader = DataLoader(rows, batch_size=2, collate_fn=StrictPromptMaskingCollator(tokenizer_of()), num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(MaskingError, match=r"\[first_label\] \(row 1\)"):
        list(loader)


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_of_the_tokenizer_is_changed(side: str) -> None:
    tokenizer = build_tokenizer("llama3", pad=None)
    tokenizer.padding_side = tokenizer.truncation_side = side
    before = dump(tokenizer)
    collate = StrictPromptMaskingCollator(tokenizer, masker=PromptMasker(tokenizer), pad_to_multiple_of=8)
    raw = [{"messages": [user("Hi"), assistant("Yes, that is a long answer.")]}, GOOD, {"prompt": "a", "response": "b"}]
    batch = collate(raw)
    assert batch["attention_mask"][1].tolist() == [1] * 3 + [0] * (batch["attention_mask"].shape[1] - 3)  # on the right
    assert dump(tokenizer) == before
    assert tokenizer.pad_token is None


def test_padding_and_truncation_that_earlier_calls_left_switched_on_change_nothing() -> None:
    tokenizer = build_tokenizer("llama3")
    raw = [{"messages": [user("Hi"), assistant("Yes, that is a long answer.")]}, GOOD, {"prompt": "a", "response": "b"}]
    collate = StrictPromptMaskingCollator(tokenizer, masker=PromptMasker(tokenizer))
    before = {name: value.tolist() for name, value in collate(raw).items()}
    tokenizer(["a b c", "d"], padding="max_length", truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer.backend_tokenizer.padding is not None
    same(collate(raw), **before)
    same(StrictPromptMaskingCollator(tokenizer, masker=PromptMasker(tokenizer))(raw), **before)


class AlpacaCollator:
    """`DataCollatorForSupervisedDataset` of the Stanford Alpaca recipe, as published."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, instances: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        input_ids, labels = ([instance[key] for instance in instances] for key in ("input_ids", "labels"))
        input_ids = torch.nn.utils.rnn.pad_sequence(
            input_ids, batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        return {"input_ids": input_ids, "labels": labels, "attention_mask": input_ids.ne(self.tokenizer.pad_token_id)}


def alpaca_rows(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Say hello.", "input": "", "output": "Hello there!"},
        {"instruction": "Name a colour.", "input": "", "output": "Blue, say."},
    ]
    made = [PromptMasker(tokenizer).encode(row)[0] for row in rows]
    return [{"input_ids": torch.tensor(r.input_ids), "labels": torch.tensor(r.labels)} for r in made]


def test_it_drops_in_for_the_supervised_collator_of_the_alpaca_recipe() -> None:
    tokenizer = tokenizer_of()
    rows = alpaca_rows(tokenizer)
    ours, theirs = StrictPromptMaskingCollator(tokenizer)(rows), AlpacaCollator(tokenizer)(rows)
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name].long()), name


def test_it_shows_the_eos_that_the_alpaca_recipe_hides_where_pad_is_eos() -> None:
    tokenizer = tokenizer_of("eos")
    rows = alpaca_rows(tokenizer)
    ours, theirs = StrictPromptMaskingCollator(tokenizer)(rows), AlpacaCollator(tokenizer)(rows)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["labels"], theirs["labels"])
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert ours["attention_mask"][i].sum() == length
        assert theirs["attention_mask"][i].sum() < length  # the EOS that ends the answer is trained unseen
        assert not theirs["attention_mask"][i, length - 1]


@st.composite
def rows_of_ids(draw: st.DrawFn, eos: int) -> dict[str, list[int]]:
    ids = draw(st.lists(st.sampled_from([5, 6, 7, eos]), min_size=2, max_size=9))
    last = draw(st.integers(1, len(ids) - 1))
    mask = [0] + [int(i == last or draw(st.booleans())) for i in range(1, len(ids))]
    return {"input_ids": ids, "labels": [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]}


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), pad=st.sampled_from(["eos", "<|pad|>", None]), multiple=st.sampled_from([None, 1, 3, 8]))
def test_a_batch_without_its_padding_is_the_rows(data: st.DataObject, pad: str | None, multiple: int | None) -> None:
    tokenizer = tokenizer_of(pad)
    rows = data.draw(st.lists(rows_of_ids(tokenizer.eos_token_id), min_size=1, max_size=5))
    batch = StrictPromptMaskingCollator(tokenizer, pad_to_multiple_of=multiple)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == (len(rows), -(-longest // (multiple or 1)) * (multiple or 1))
    for i, row in enumerate(rows):
        length = int(batch["attention_mask"][i].sum())
        assert batch["attention_mask"][i, :length].all()
        assert batch["input_ids"][i, :length].tolist() == row["input_ids"]
        assert batch["labels"][i, :length].tolist() == row["labels"]
        assert (batch["labels"][i, length:] == IGNORE).all()
