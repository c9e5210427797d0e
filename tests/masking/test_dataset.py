"""`mask_dataset` against the loop it stands for: rows, report, row numbers, cache, streams and memory."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, List, Value, load_dataset, load_from_disk
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, mask_dataset
from sft_plugins.masking.dataset import _EncodeTable
from testkit.conversations import TemplateKnobs, assistant, conversations, user
from testkit.encoding import SPLIT, STRIP
from testkit.tokenizers import build_tokenizer, tokenizer_for_template

BAD = {"messages": [user("Hello"), {"role": "wizard", "content": "b"}]}


def chat(i: int) -> dict[str, Any]:
    return {"messages": [user(f"Question {i}"), assistant("Answer " + "word " * (i % 7) + str(i))]}


@functools.cache
def tokenizer_of(template: str = STRIP) -> Any:
    return build_tokenizer("qwen", chat_template=template)


def masker(**options: Any) -> PromptMasker:
    return PromptMasker(tokenizer_of(), **options)


def rows_of(dataset: Any) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in dataset]


def loop(rows: Any, by: PromptMasker) -> list[tuple[list[int], list[int]]]:
    """The naive equivalent."""
    return [(made.input_ids, made.labels) for row in rows for made in by.encode(row)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"train_on": "last"},
    {"on_history_rewrite": "raise"},
    {"max_length": 40, "overflow": "truncate"},
    {"max_length": 40, "overflow": "keep_turns"},
    {"max_length": 40, "overflow": "drop"},
]


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(rows=st.lists(conversations(max_turns=2), min_size=1, max_size=6), options=st.sampled_from(OPTIONS))
def test_a_masked_dataset_is_the_rows_of_the_loop(rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    by = masker(errors="drop", **options)
    dataset = Dataset.from_list(rows)
    made, report = mask_dataset(dataset, by)
    expected = loop(dataset, by)
    assert rows_of(made) == expected
    assert (report.rows_in, report.rows_out) == (len(rows), len(expected))
    assert report.tokens == sum(len(ids) for ids, _ in expected)
    assert report.dropped_rows == sum(not by.encode(row) for row in dataset)


def test_the_options_above_split_cut_and_drop() -> None:
    """Guard: on these rows they really do."""
    data = Dataset.from_list([SPLIT, chat(1), BAD, {"messages": [*chat(0)["messages"]] * 3}])
    reports = [mask_dataset(data, masker(errors="drop", **options)).report for options in OPTIONS]
    assert reports[0].split_rows == 1
    assert reports[1].split_rows == 0
    assert set(reports[2].failures) == {"history_rewrite", "bad_schema"}
    assert reports[3].cut_rows > 0
    assert reports[4].lost_tokens > 0
    assert "overflow" in reports[5].failures


def test_columns_are_ids_and_labels_and_nothing_else() -> None:
    made = mask_dataset(Dataset.from_list([{**chat(0), "id": 7, "note": "x"}]), masker()).dataset
    assert made.column_names == ["input_ids", "labels"]
    assert {name: feature.feature.dtype for name, feature in made.features.items()} == dict.fromkeys(
        ("input_ids", "labels"), "int32"
    )
    assert made.format["type"] is None
    stream = mask_dataset(Dataset.from_list([{**chat(0), "id": 7}]).to_iterable_dataset(), masker()).dataset
    assert set(next(iter(stream))) == {"input_ids", "labels"}
    assert list(stream.features) == ["input_ids", "labels"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_two_processes_make_what_one_makes(tmp_path: Path, on_disk: bool) -> None:
    data = Dataset.from_list([SPLIT if i % 5 == 1 else BAD if i % 11 == 3 else chat(i) for i in range(40)])
    if on_disk:
        data.save_to_disk(tmp_path / "data")
        data = load_from_disk(tmp_path / "data")
    by = masker(errors="drop")
    one, two = mask_dataset(data.select(range(40)), by), mask_dataset(data, by, num_proc=2)
    assert rows_of(two.dataset) == rows_of(one.dataset) == loop(data, by)
    assert two.report.to_dict() == one.report.to_dict()
    assert two.report.split_rows == 8
    assert two.report.failures["bad_schema"].first_rows == [3, 14, 25]  # row 36 is a split one


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("bad", [0, 257, 599])
def test_an_error_carries_the_number_of_its_row(bad: int, num_proc: int | None) -> None:
    """Batches hold 256 rows; the number is that of the data all the same."""
    rows = [chat(0)] * 600
    rows[bad] = BAD
    with pytest.raises(MaskingError, match="wizard") as caught:
        mask_dataset(Dataset.from_list(rows), masker(), num_proc=num_proc)
    assert (caught.value.code, caught.value.row) == ("bad_schema", bad)
    assert f"row {bad}" in str(caught.value)


def test_selected_and_shuffled_rows_count_in_their_own_order() -> None:
    data = Dataset.from_list([BAD if i == 9 else chat(i) for i in range(12)])
    by = masker(errors="drop")
    for view in (data.select([3, 9, 1]), data.shuffle(seed=1), data.select(range(8, 11)), data.select([11, 10, 9])):
        made, report = mask_dataset(view, by)
        assert rows_of(made) == loop(view, by)
        position = next(i for i, row in enumerate(view) if row == data[9])
        assert report.failures["bad_schema"].first_rows == [position]
        with pytest.raises(MaskingError) as caught:
            mask_dataset(view, masker())
        assert caught.value.row == position


def test_a_format_set_on_the_dataset_changes_nothing() -> None:
    data = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]).with_format("torch")
    by = masker(stop_token_ids=[7])
    made = mask_dataset(data, by).dataset
    assert rows_of(made) == [([5, 6, 7], [-100, 6, 7])]


def test_a_row_is_counted_once_wherever_its_parts_come_to_lie() -> None:
    """The report is read in slices; what was made of one row, and what failed of it, may lie in two of them."""
    tokenizer = tokenizer_of()
    long = copy.deepcopy(SPLIT)
    long["messages"][1]["reasoning_content"] = "Six sevens. " * 40  # its first row is too long, its second is not
    rows = [SPLIT if i % 3 else long for i in range(400)]
    by = PromptMasker(tokenizer, max_length=120, overflow="drop")
    assert [len(by.encode(row)) for row in (SPLIT, long)] == [2, 1]
    for first in ([], [chat(0)]):  # the second shifts everything by one record
        report = mask_dataset(Dataset.from_list([*first, *rows]), by).report
        assert report.split_rows == 266
        assert report.dropped_rows == 0
        assert report.failures["overflow"].count == 134
        stream, counts = mask_dataset(Dataset.from_list([*first, *rows]).to_iterable_dataset(), by)
        assert len(list(stream)) == report.rows_out
        assert (counts.split_rows, counts.dropped_rows) == (266, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Dataset:
    Dataset.from_list([SPLIT if i == 1 else BAD if i == 3 else chat(i) for i in range(6)]).save_to_disk(tmp_path / "d")
    return load_from_disk(tmp_path / "d")


def test_a_second_call_reads_the_cache_and_brings_the_same_report(disk: Dataset, monkeypatch: Any) -> None:
    calls = 0
    encode = _EncodeTable.__call__

    def counted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return encode(self, *args)

    monkeypatch.setattr(_EncodeTable, "__call__", counted)
    first = mask_dataset(disk, masker(errors="drop"))
    assert calls == 1
    again = mask_dataset(disk, masker(errors="drop"))  # another masker, equal in all that matters
    assert calls == 1
    assert rows_of(again.dataset) == rows_of(first.dataset)
    assert again.report.to_dict() == first.report.to_dict()
    assert again.report.split_rows == 1
    assert again.report.dropped_rows == 1
    mask_dataset(disk, masker(errors="drop", train_on="last"))
    assert calls == 2


def test_a_changed_template_for_tools_is_not_read_from_the_cache(disk: Dataset) -> None:
    """A tokenizer may have a second template for rows with tools."""
    tokenizer = build_tokenizer("qwen")
    plain, tools = tokenizer.chat_template, [{"type": "function", "function": {"name": "f"}}]
    data = disk.map(lambda _: chat(0) | {"tools": tools}, remove_columns=disk.column_names)
    made = []
    for name in ("one", "two"):
        tokenizer.chat_template = {"default": plain, "tool_use": f"Tools, {name}: {{{{ tools | tojson }}}}.{plain}"}
        by = PromptMasker(tokenizer)
        made.append(rows_of(mask_dataset(data, by).dataset))
        assert made[-1] == loop(data, by)
    assert made[0] != made[1]


def _more_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<extra>"])


def _other_template(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template + "\n"


def _other_eos(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|im_start|>"


@pytest.mark.parametrize("change", [_more_tokens, _other_template, _other_eos])
@pytest.mark.parametrize("kind", ["qwen", "byt5"])
def test_a_changed_tokenizer_changes_the_fingerprint(change: Any, kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    before = PromptMasker(tokenizer).fingerprint()
    assert PromptMasker(copy.deepcopy(tokenizer)).fingerprint() == before
    change(tokenizer)
    assert PromptMasker(tokenizer).fingerprint() != before


def test_every_option_changes_the_fingerprint() -> None:
    options: list[dict[str, Any]] = [
        {}, {"train_on": "last"}, {"errors": "drop"}, {"on_history_rewrite": "raise"},
        {"special_tokens_in_content": "allow"}, {"max_length": 64}, {"max_length": 65},
        {"max_length": 64, "overflow": "drop"}, {"max_length": 64, "overflow": "truncate"},
        {"max_length": 64, "overflow": "keep_turns"}, {"chat_template": TemplateKnobs(strip=True).jinja()},
        {"stop_token_ids": [tokenizer_of().eos_token_id, 5]}, {"stop_token_ids": [5]},
    ]  # fmt: skip
    assert len({masker(**one).fingerprint() for one in options}) == len(options)


def test_a_call_with_padding_and_truncation_in_between_changes_nothing() -> None:
    tokenizer = build_tokenizer("llama3")
    data = Dataset.from_list([chat(i) for i in range(4)])
    by = PromptMasker(tokenizer)
    before, rows = by.fingerprint(), rows_of(mask_dataset(data, by).dataset)
    tokenizer(["a", "b c d e f"], padding=True, truncation=True, max_length=3)
    assert by.fingerprint() == PromptMasker(tokenizer).fingerprint() == before
    assert rows_of(mask_dataset(Dataset.from_list(list(data)), PromptMasker(tokenizer)).dataset) == rows


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_rows_of_the_dataset_and_its_report_grows() -> None:
    data = Dataset.from_list([SPLIT if i == 1 else BAD if i == 3 else chat(i) for i in range(300)])
    by = masker(errors="drop")
    stream, report = mask_dataset(data.to_iterable_dataset(), by)
    whole, expected = mask_dataset(data, by)
    assert isinstance(stream, IterableDataset)
    assert report.rows_in == 0
    drawn = iter(stream)
    next(drawn)
    assert 0 < report.rows_in < 300
    assert rows_of(drawn) == rows_of(whole)[1:]
    assert report.rows_in == 300
    for name, value in expected.to_dict().items():
        if name not in ("notes", "repeated_prefixes"):
            assert report.to_dict()[name] == value, name
    assert any("drawn so far" in note for note in report.notes)


def test_a_stream_from_a_generator_without_known_columns() -> None:
    stream = IterableDataset.from_generator(lambda: (chat(i) for i in range(5)))
    made = mask_dataset(stream, masker()).dataset
    assert rows_of(made) == loop([chat(i) for i in range(5)], masker())


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "pandas"])
def test_a_format_set_on_a_stream_changes_nothing(kind: str) -> None:
    data = Dataset.from_list([chat(i) for i in range(3)])
    made = mask_dataset(data.to_iterable_dataset().with_format(kind), masker()).dataset
    assert rows_of(made) == loop(data, masker())


def test_an_error_in_a_stream_carries_the_number_of_its_row() -> None:
    rows = [BAD if i == 270 else chat(i) for i in range(300)]
    stream, _ = mask_dataset(Dataset.from_list(rows).to_iterable_dataset(), masker())
    with pytest.raises(MaskingError, match="wizard") as caught:
        list(stream)
    assert caught.value.row == 270


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code", "match"),
    [
        (DatasetDict({"train": Dataset.from_list([chat(0)])}), "bad_schema", "'train'"),
        ({"train": [chat(0)]}, "bad_schema", "'train'"),
        ([chat(0)], "bad_schema", "list"),
        ("data.jsonl", "bad_schema", "str"),
        (Dataset.from_list([]), "empty_dataset", "no rows"),
        (Dataset.from_list([chat(0)]).select([]), "empty_dataset", "no rows"),
        (IterableDataset.from_generator(lambda: iter(())), "empty_dataset", "no rows"),
    ],
    ids=["DatasetDict", "dict", "list", "path", "empty", "selected_empty", "empty_stream"],
)
def test_what_is_no_dataset_is_refused(data: Any, code: str, match: str) -> None:
    with pytest.raises(MaskingError, match=match) as caught:
        mask_dataset(data, masker())
    assert caught.value.code == code
    assert caught.value.remedy


def test_processes_for_a_stream_are_refused() -> None:
    with pytest.raises(MaskingError, match="num_proc=2") as caught:
        mask_dataset(Dataset.from_list([chat(0)]).to_iterable_dataset(), masker(), num_proc=2)
    assert caught.value.code == "bad_option"


def test_a_dataset_of_which_every_row_is_dropped_is_empty_and_says_why() -> None:
    made, report = mask_dataset(Dataset.from_list([BAD, BAD]), masker(errors="drop"))
    assert len(made) == 0
    assert made.column_names == ["input_ids", "labels"]
    assert report.failures["bad_schema"].count == report.dropped_rows == 2


def test_a_transform_is_refused_since_rows_are_read_as_stored() -> None:
    """What is stored is not what the user sees; masking it would train other answers."""
    data = Dataset.from_list([chat(0)]).with_transform(lambda _: {"messages": [chat(1)["messages"]]})
    assert data[0] == chat(1)
    with pytest.raises(MaskingError, match="with_transform") as caught:
        mask_dataset(data, masker())
    assert caught.value.code == "bad_schema"
    assert rows_of(mask_dataset(data.with_format(None), masker()).dataset) == loop([chat(0)], masker())


# ---------------------------------------------------------------------------------------------------------------------
# JSON text
# ---------------------------------------------------------------------------------------------------------------------

_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "unit": None}}}
_CALLS = {"messages": [user("Weather?"), {"role": "assistant", "content": "", "tool_calls": [_CALL]}]}
_STRUCT = {
    "role": Value("string"),
    "content": Value("string"),
    "tool_calls": List({"type": Value("string"), "function": {"name": Value("string"), "arguments": Json()}}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["file", "messages", "arguments", "text"])
def test_json_columns_are_read_and_their_nulls_are_part_of_the_answer(tmp_path: Path, form: str, stream: bool) -> None:
    """`load_dataset("json")` stores messages as JSON text where only some of them have tool calls."""
    rows = [_CALLS, chat(0)]
    if form == "file":
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
        assert data.features == Features({"messages": List(Json())}), "datasets reads such files in another way now"
    elif form == "text":
        data = Dataset.from_list([{"messages": json.dumps(row["messages"])} for row in rows])
    else:
        data = Dataset.from_list(rows, features=Features({"messages": List(Json() if form == "messages" else _STRUCT)}))
    tokenizer = tokenizer_for_template("qwen2_5")
    made = list(mask_dataset(data.to_iterable_dataset() if stream else data, PromptMasker(tokenizer)).dataset)
    rendered = [tokenizer.apply_chat_template(row["messages"], tokenize=False).rstrip("\n") for row in rows]
    assert "null" in rendered[0]
    assert [tokenizer.decode(row["input_ids"]) for row in made] == rendered


def test_a_null_in_the_schema_of_a_tool_stands_in_the_prompt_as_it_does_at_generation() -> None:
    schema = {"type": "object", "properties": {"unit": {"type": "string", "default": None}}}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}]
    tokenizer = tokenizer_for_template("qwen2_5")
    (made,) = PromptMasker(tokenizer).encode(chat(0) | {"tools": json.dumps(tools)})
    prompt = tokenizer.apply_chat_template(
        chat(0)["messages"][:1], tools=tools, add_generation_prompt=True, tokenize=False
    )
    assert '"default": null' in prompt
    assert tokenizer.decode(made.input_ids).startswith(prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

_PROGRAM = """
import sys, threading, time
sys.path.insert(0, sys.argv[2])
from datasets import load_from_disk
from sft_plugins.masking import PromptMasker, mask_dataset
from testkit.tokenizers import build_tokenizer

# Pages of a mapped file count as resident too, though the kernel may take them back: only the rest is ours.
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, own())
        time.sleep(0.01)

data, masker = load_from_disk(sys.argv[1]), PromptMasker(build_tokenizer("bytelevel"))
mask_dataset(data.select(range(300)), masker)  # what is allocated once
watcher = threading.Thread(target=watch)
watcher.start()
made, report = mask_dataset(data, masker)
done.set()
watcher.join()
assert len(made) == len(data)
print(max(peak, own()), report.tokens)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    support = Path(__file__).parents[1] / "support"
    long = {"prompt": "Say it.", "response": "The answer is four. " * 250}
    peaks, sizes = [], []
    for rows in (1000, 4000):  # fewer than that, and the first batches still decide
        folder = tmp_path / str(rows)
        Dataset.from_list([long] * rows).save_to_disk(folder)
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(folder), str(support)], capture_output=True, text=True, check=True
        )
        peak, tokens = map(int, done.stdout.split())
        peaks.append(peak)
        sizes.append(tokens * 8)  # ids and labels, int32 each
    grown = sizes[1] - sizes[0]
    assert grown > 10e6  # guard: there is something to hold
    assert peaks[1] - peaks[0] < 0.5 * grown, (peaks, sizes)  # allocators differ by some 10 MB from run to run
