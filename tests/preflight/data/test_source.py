"""Data and models as they lie on disk: every format gives the same rows, what is broken is named, nothing is held in memory."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_plugins.errors import AssetError
from sft_plugins.masking import PromptMasker, check_masks, mask_dataset
from sft_plugins.preflight import models
from sft_plugins.preflight.data import readers
from sft_plugins.preflight.data.documents import document_spans, kind_of, with_lengths
from sft_plugins.preflight.data.files import read_text
from sft_plugins.preflight.data.masked import mask_rows
from sft_plugins.preflight.data.source import check_form, open_data
from sft_plugins.preflight.models import load_config, load_model, load_tokenizer
from testkit.commands import chat_tokenizer, conversations, model_folder, write_jsonl

PAIRS = [{"prompt": f"question {i}", "response": "one, two\nthree ☺" * (i + 1)} for i in range(5)]


def refused(function: Callable[[], Any], code: str, message: str = "") -> AssetError:
    with pytest.raises(AssetError, match=message) as caught:
        function()
    assert caught.value.code == code
    assert caught.value.remedy  # a message a person can act on
    return caught.value


# --- formats ----------------------------------------------------------------------------------------------------------


def write_csv(path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "response"], delimiter="\t" if path.suffix == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(PAIRS)
    path.write_text(text.getvalue(), encoding="utf-8-sig", newline="")


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(PAIRS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


FORMATS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: write_jsonl(path, PAIRS),
    "rows.json": lambda path: path.write_text(json.dumps(PAIRS, indent=2, ensure_ascii=False), encoding="utf-8-sig"),
    "lines.json": lambda path: write_jsonl(path, PAIRS),
    "rows.csv": write_csv,
    "rows.tsv": write_csv,
    "rows.parquet": lambda path: Dataset.from_list(PAIRS).to_parquet(str(path)),
    "stream.arrow": write_arrow_stream,
    "file.arrow": lambda path: pa.feather.write_feather(pa.Table.from_pylist(PAIRS), str(path)),
    "saved": lambda path: Dataset.from_list(PAIRS).save_to_disk(str(path)),
    "one_split": lambda path: DatasetDict({"train": Dataset.from_list(PAIRS)}).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_as_often_as_asked(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    source = open_data(tmp_path / name)
    assert source.kind == "raw"
    assert list(source.rows()) == PAIRS
    assert list(source.rows()) == PAIRS
    assert list(open_data(tmp_path / name, limit=2).rows()) == PAIRS[:2]
    dataset = source.dataset()
    assert dataset is None or dataset.to_list() == PAIRS


def test_renamed_rows_are_what_the_function_makes_of_them(tmp_path: Path) -> None:
    source = open_data(write_jsonl(tmp_path / "rows.jsonl", [{"q": "a", "ids": [1]}, {"q": "b", "ids": [2]}]))
    renamed = source.map(lambda row: {"input_ids": row["ids"], "labels": row["ids"]})
    assert (source.kind, renamed.kind) == ("raw", "tokenised")
    assert list(renamed.rows()) == [{"input_ids": [1], "labels": [1]}, {"input_ids": [2], "labels": [2]}]


def test_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    splits = {"train": Dataset.from_list(PAIRS), "test": Dataset.from_list(PAIRS[:1])}
    DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    refused(lambda: open_data(tmp_path / "two"), "bad_data", "holds several splits: train, test")
    refused(lambda: open_data(tmp_path / "two", split="dev"), "bad_data", "has no split 'dev'")
    assert list(open_data(tmp_path / "two", split="test").rows()) == PAIRS[:1]


@pytest.mark.parametrize("below", ["", "sft_plugins-0123"])
def test_of_axolotls_prepared_folder_the_newest_data_set_is_read(below: str, tmp_path: Path) -> None:
    for name, rows, age in (("abc", PAIRS[:1], 100), ("def", PAIRS, 0)):
        folder = tmp_path / below / name
        Dataset.from_list(rows).save_to_disk(str(folder))
        os.utime(folder / "state.json", (time.time() - age,) * 2)
    source = open_data(tmp_path)
    assert list(source.rows()) == PAIRS
    assert source.format == "Axolotl prepared"
    assert source.notes == ("of 2 prepared data sets the newest is read: def",)


# --- kinds of rows ----------------------------------------------------------------------------------------------------


def test_packed_rows_are_told_by_their_lengths_or_by_positions_that_restart() -> None:
    ids = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}
    assert kind_of({"messages": []}) == "raw"
    assert kind_of(ids) == kind_of(ids | {"position_ids": [0, 1, 2, 3, 4], "seq_lengths": None}) == "tokenised"
    assert kind_of(ids | {"seq_lengths": [2, 3]}) == kind_of(ids | {"position_ids": [0, 1, 0, 1, 2]}) == "packed"
    assert document_spans(ids | {"seq_lengths": [2, 3]}) == [(0, 2), (2, 5)]
    assert document_spans(ids | {"position_ids": [0, 1, 0, 1, 2]}) == [(0, 2), (2, 5)]
    assert document_spans(ids | {"position_ids": [7, 8, 0, 1, 2]}) == [(0, 2), (2, 5)]
    assert document_spans(ids) == [(0, 5)]


def test_rows_packed_by_positions_are_audited_by_document_like_those_with_lengths() -> None:
    """Of rows of 2, 1, 3 documents and one without ids; some documents carry no loss."""
    tokenizer = chat_tokenizer()
    (good,) = PromptMasker(tokenizer).encode(conversations(1)[0])
    ids, labels = good.input_ids, good.labels
    bad = {(0, 1), (2, 0), (2, 2)}
    by_length: list[dict[str, Any]] = []
    by_position: list[dict[str, Any]] = []
    for row, count in enumerate((2, 1, 3)):
        marks = [[-100] * len(ids) if (row, i) in bad else labels for i in range(count)]
        packed = {"input_ids": ids * count, "labels": [*chain(*marks)]}
        by_length.append(packed | {"seq_lengths": [len(ids)] * count})
        by_position.append(packed | {"position_ids": [*range(len(ids))] * count})
    assert [with_lengths(row).get("seq_lengths") for row in by_position] == [[len(ids)] * 2, None, [len(ids)] * 3]
    for rows in (by_length, by_position):
        report = check_masks(map(with_lengths, [*rows, {"labels": [1]}]), tokenizer)
        found = report.failures["no_supervised_tokens"]
        assert set(zip(found.first_rows, found.first_documents, strict=True)) == bad
        assert found.places == "#0 document 2, #2 document 1, #2 document 3"
        assert (found.count, report.rows_in, report.rows_out) == (3, 4, 6)
        assert report.failures["bad_schema"].first_rows == [3]
    alone = check_masks([{"input_ids": ids, "labels": [-100] * len(ids)}], tokenizer)
    assert (alone.notes, alone.failures["no_supervised_tokens"].first_documents) == ([], [])


def test_columns_that_fit_no_row_form_are_refused_but_one_bad_row_among_good_ones_is_not(tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"question": "a", "answer": "b"}] * 3)
    error = refused(lambda: check_form(open_data(bad)), "bad_schema", "found columns `answer`, `question`")
    assert "`instruction`(+`input`)+`output`" in str(error.remedy)
    preferences = write_jsonl(tmp_path / "preferences.jsonl", [{"chosen": "a", "rejected": "b"}] * 3)
    refused(lambda: check_form(open_data(preferences)), "bad_schema", "as preference data does")
    check_form(open_data(write_jsonl(tmp_path / "mixed.jsonl", [{"question": "a"}, *PAIRS])))
    check_form(open_data(write_jsonl(tmp_path / "role.jsonl", [{"messages": [{"role": "asistant", "content": "a"}]}])))


# --- broken files -----------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str | bytes, str, str]] = {
    "line.jsonl": ('{"prompt": "a"}\n\n{"prompt": \n', "bad_jsonl", r"line 3, column 11 is not valid JSON"),
    "list.jsonl": ('{"prompt": "a"}\n"b"\n', "bad_jsonl", "line 2 holds a JSON str, an object was expected"),
    "numbers.json": ('[{"a": 1},\n 2]', "bad_jsonl", "line 2 holds a JSON int, an object was expected"),
    "empty.jsonl": ("", "no_rows", "is empty"),
    "blank.jsonl": ("\n \n", "no_rows", "holds no rows"),
    "empty.json": (" [ ] ", "no_rows", "holds no rows"),
    "header.csv": ("prompt,response\n", "no_rows", "holds no rows"),
    "latin.jsonl": ('{"prompt": "\xff"}'.encode("latin-1"), "bad_data", r"cannot be read as UTF-8 text.*0xff"),
    "noise.csv": (b"prompt,response\na,\xff\xfe\n", "bad_data", "cannot be read as UTF-8 text"),
    "binary.jsonl": (b"\x00\x01\x02\x03" * 9, "bad_data", "binary file"),
    "rows.jsonl.gz": (b"\x1f\x8b\x08\x00rest", "bad_data", "binary file"),
    "wide.jsonl": ('{"prompt": "a"}'.encode("utf-16"), "bad_data", "is UTF-16 text; UTF-8 was expected"),
    "unmarked.jsonl": ('{"prompt": "a"}'.encode("utf-16-le"), "bad_data", "is UTF-16 text"),
    "wider.json": ('[{"prompt": "a"}]'.encode("utf-32"), "bad_data", "is UTF-32 text"),
    "wide.csv": ("prompt,response\na,b\n".encode("utf-16-be"), "bad_data", "is UTF-16 text"),
    "fake.parquet": (b"PAR1 and no more", "bad_data", "cannot be read"),
    "fake.arrow": (b"not an arrow file at all", "bad_data", "cannot be read"),
    "fields.csv": ("prompt,response\na,b\nc\n", "bad_data", "line 3 has 1 fields, the header 2"),
    "twice.csv": ("prompt,prompt\na,b\n", "bad_data", "names a column twice"),
    "quotes.csv": ('prompt,response\na,"b\n', "bad_data", "is not valid CSV"),
    "deep.jsonl": ("[" * 5000, "bad_jsonl", "nested too deeply|not valid JSON"),
    "deeper.jsonl": ('{"a":' * 200_000, "bad_jsonl", "nested too deeply"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_place_of_the_fault(name: str, tmp_path: Path) -> None:
    content, code, message = BROKEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(lambda: list(open_data(tmp_path / name).rows()), code, message)
    assert name in error.message


def test_places_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: open_data(tmp_path / "none.jsonl"), "missing_file", "no such file or folder")
    file = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    refused(lambda: open_data(file / "below"), "missing_file", "no such file or folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    refused(lambda: open_data(tmp_path / "folder"), "bad_data", "holds no saved data set; it holds notes.txt")

    def denied(*_: Any, **__: Any) -> None:  # root may read everything, so permission is taken away here
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", denied)
    refused(lambda: open_data(file), "unreadable", "cannot be read: Permission denied")


def test_a_long_answer_in_a_table_is_read_whole(tmp_path: Path) -> None:
    """Python's csv refuses fields of more than 131,072 characters by itself."""
    (tmp_path / "rows.csv").write_text(f"prompt,response\na,{'b' * 200_000}\n")
    (row,) = open_data(tmp_path / "rows.csv").rows()
    assert len(row["response"]) == 200_000


def test_a_home_folder_of_nobody_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("~nobody_of_that_name/rows.jsonl", "~nobody_of_that_name"):
        for read in (open_data, load_config, read_text):
            refused(lambda read=read, path=path: read(path), "missing_file", f"{path}.*no user of that name")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    assert list(open_data("~/rows.jsonl").rows()) == PAIRS


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"], ids=["too long", "a zero in it"])
def test_names_that_no_file_can_have_are_told_in_one_line(path: str) -> None:
    for read in (read_text, open_data):
        with pytest.raises(AssetError) as error:
            read(path)
        assert error.value.code in ("unreadable", "missing_file")
        assert path in error.value.message


def test_a_full_temporary_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.arrow_writer import ArrowWriter

    source = open_data(write_jsonl(tmp_path / "rows.jsonl", PAIRS))
    masker = PromptMasker(chat_tokenizer(), errors="drop")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrowWriter, "write_table", full)
        refused(lambda: mask_rows(source, masker), "unwritable", r"masked-00000\.arrow: .*No space left on device")
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    error = refused(lambda: mask_rows(source, masker), "unwritable", "No space left on device")
    assert "TMPDIR" in str(error.remedy)


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", PAIRS),
        ("train[:2]", PAIRS[:2]),
        ("train[-2:]", PAIRS[3:]),
        ("train[20%:60%]", PAIRS[1:3]),
        ("train[:1]+train[4:]", [PAIRS[0], PAIRS[4]]),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_split_may_name_a_part_of_a_file(name: str, split: str, rows: list[Any], tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    assert list(open_data(tmp_path / name, split=split).rows()) == rows


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "has no split 'test'"),
        ("train[:200%]", "names no part"),
        ("train[a:b]", "names no part"),
        ("train[7:]", "no rows"),
    ],
)
def test_a_part_that_is_not_there_is_refused(split: str, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    with pytest.raises(AssetError, match=message):
        open_data(path, split=split)


# --- one JSON array ---------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1, max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_an_array_is_read_as_json_reads_it_wherever_its_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "array.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass") if ascii_only else text.encode("utf-8", "replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        got = list(readers.json_rows(path))
    assert got == json.loads(path.read_bytes())


@pytest.mark.parametrize("chunk", [3, 2**16])
@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1},\n {"b": }]',
        '[{"a": 1},\n {"b": "open]\n',
        '[{"a": 1}\n {"b": 2}]',
        '[{"a": 1},\n\n   {"b": tru}]',
        '[{"a": 1,\n "b": "line\nbreak"}]',
        '[{"a": 1}, {"b": 2}',
        '[{"a": 1}]\n  ]',
        '[\n{"a" 1}]',
    ],
)
def test_faults_of_an_array_are_placed_where_json_places_them(
    text: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(json.JSONDecodeError) as wanted:
        json.loads(text)
    place = f"line {wanted.value.lineno}, column {wanted.value.colno} "
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    refused(lambda: list(readers.json_rows(tmp_path / "rows.json")), "bad_jsonl", place)


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_reading_takes_the_memory_of_a_row_not_of_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"prompt": f"{i} " + "x" * 1000, "response": "y"} for i in range(8000)]
    path.write_text(json.dumps(rows)) if name.endswith(".json") else write_jsonl(path, rows)
    del rows
    assert path.stat().st_size > 8e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_data(path).rows()) == 8000
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_file_that_is_one_endless_line_is_refused_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MOST_CHARACTERS", 1000)
    (tmp_path / "rows.jsonl").write_text("x" * 5000)
    refused(lambda: open_data(tmp_path / "rows.jsonl"), "bad_data", "line 1: one row has more than 1,000 characters")


def test_masking_a_file_takes_the_memory_of_a_batch_not_of_the_file(tmp_path: Path) -> None:
    """Of Python's memory and Arrow's: four times the rows take less than half as much again."""
    masker = PromptMasker(chat_tokenizer(), errors="drop")
    peaks = []
    for count in (512, 2048):
        source = open_data(write_jsonl(tmp_path / f"{count}.jsonl", conversations(count)))
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            masked, report = mask_rows(source, masker)
            peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        finally:
            tracemalloc.stop()
        assert len(masked) == report.rows_out == count
        assert masked.cache_files  # on disk, not in memory
    assert peaks[1] < 1.5 * peaks[0]


# --- masking ----------------------------------------------------------------------------------------------------------


def test_rows_masked_from_a_file_and_their_report_are_those_of_mask_dataset(tmp_path: Path) -> None:
    """Over several batches, failures among them, of which the last batch is not full."""
    rows = conversations(600)
    for i in (0, 255, 256, 300):
        rows[i]["messages"][1]["content"] = ""
    for row in rows:
        row["score"] = 0.5
    masker = PromptMasker(chat_tokenizer(), errors="drop", max_length=40, overflow="keep_turns")
    done: list[int] = []
    masked, report = mask_rows(open_data(write_jsonl(tmp_path / "rows.jsonl", rows)), masker, advance=done.append)
    wanted, wanted_report = mask_dataset(Dataset.from_list(rows), masker)
    assert masked.to_list() == wanted.to_list()
    assert report.to_dict() == wanted_report.to_dict()
    assert report.unread_columns == ["score"]
    assert report.failures["empty_response"].count == 4
    assert {"empty_response"} < set(report.failures)  # and rows of which no turn fits
    assert done == [256, 256, 88]


def test_rows_of_any_mixture_of_columns_and_types_are_masked(tmp_path: Path) -> None:
    """What no Arrow table could hold: messages as a list here and as JSON text there, rows of other forms in between."""
    (row,) = conversations(1)
    rows = [row, {"messages": json.dumps(row["messages"])}, {"prompt": "a", "response": "b"}, {"nothing": 1}]
    masker = PromptMasker(chat_tokenizer(), errors="drop")
    _, report = mask_rows(open_data(write_jsonl(tmp_path / "rows.jsonl", rows)), masker)
    assert (report.rows_in, report.rows_out) == (4, 3)
    assert report.failures["bad_schema"].first_rows == [3]


def test_masked_rows_may_all_be_refused(tmp_path: Path) -> None:
    source = open_data(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": ""}]))
    masked, report = mask_rows(source, PromptMasker(chat_tokenizer(), errors="drop"))
    assert len(masked) == 0
    assert report.dropped_rows == 1


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_loaded_from_its_folder(tmp_path: Path) -> None:
    loaded = load_tokenizer(str(model_folder(tmp_path / "model")))
    assert loaded("The answer")["input_ids"] == chat_tokenizer()("The answer")["input_ids"]


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(lambda: load_tokenizer(str(tmp_path)), "bad_model", "has no tokenizer")
    assert load_config(str(tmp_path)).model_type == "llama"
    (tmp_path / "tokenizer.json").write_text('{"broken')
    refused(lambda: load_tokenizer(str(tmp_path)), "bad_model", "does not hold a tokenizer that can be loaded")
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: load_config(str(tmp_path)), "bad_model", "does not hold a model's configuration")
    refused(lambda: load_model(str(tmp_path)), "bad_model", "does not hold a causal language model")


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_model])
def test_models_that_are_nowhere_are_named(load: Callable[[str], Any], tmp_path: Path) -> None:
    refused(lambda: load(str(tmp_path / "nowhere")), "missing_file", "there is no such folder")
    error = refused(
        lambda: load("nobody/none"), "model_unreachable", "neither a folder here nor a model the hub could give"
    )
    assert "HF_HUB_OFFLINE" in str(error.remedy)


def test_without_an_address_of_the_hub_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client would try six times, for a minute; a model in its cache is still found."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def unknown(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    asked: list[bool] = []

    class Factory:
        @staticmethod
        def from_pretrained(where: str, *, local_files_only: bool, trust_remote_code: bool) -> str:
            asked.append(local_files_only)
            assert trust_remote_code is False  # None would ask on the terminal
            return where

    assert models._load(Factory, ".", "a tokenizer") == "."
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    models._load(Factory, "owner/name", "a tokenizer")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")  # then the proxy is asked, not the name
    models._load(Factory, "owner/name", "a tokenizer")
    assert asked == [False, True, False]
