"""`sft-plugins inspect`: what is shown of a row is what is trained of it, in the terminal, under --json and on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.cli.ui.render import NAMES, token_kinds
from sft_plugins.cli.ui.rows import token_texts, turn_starts
from sft_plugins.masking import PromptMasker, mask_dataset
from sft_plugins.masking.turns.tokenizer import TextTokenizer
from sft_plugins.packing import pack_dataset
from testkit.browser import open_page
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl
from testkit.tokenizers import build_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", conversations(6))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    rows, _ = mask_dataset(Dataset.from_list(conversations(12)), PromptMasker(chat_tokenizer()))
    pack_dataset(rows, 160, seed=0)[0].save_to_disk(str(folder))
    return folder


def inspected(*arguments: object) -> list[dict[str, Any]]:
    done = invoke("inspect", *arguments, "--json")
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


# --- what is shown is what is trained ---------------------------------------------------------------------------------


def test_the_tokens_shown_are_those_that_masking_makes(model: Path, data: Path) -> None:
    wanted, _ = mask_dataset(Dataset.from_list(conversations(6)), PromptMasker(chat_tokenizer()))
    shown = inspected(data, "--model", model, "--count", "6")
    assert [[token["id"] for token in row["tokens"]] for row in shown] == wanted["input_ids"]
    assert [[token["label"] for token in row["tokens"]] for row in shown] == wanted["labels"]
    for row in shown:
        assert "".join(token["text"] for token in row["tokens"]) == chat_tokenizer().decode(
            [t["id"] for t in row["tokens"]]
        )
        assert row["turns"][0][0] == 0
        assert row["turns"][-1][1] == len(row["tokens"])
        assert len(row["turns"]) == 2


def test_options_of_the_masker_are_passed_on(model: Path, tmp_path: Path) -> None:
    turns = conversations(1)[0]["messages"] * 2
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": [turns[0], turns[1] | {"content": "<|im_start|>"}]}]
    )

    def trained(*options: object) -> list[int]:
        return [row["trained"] for row in inspected(data, "--model", model, *options)]

    both, refused = trained()
    assert refused == 0
    assert trained("--train-on", "last")[0] == both // 2
    assert trained("--special-tokens-in-content", "allow")[1] > 0
    length = len(inspected(data, "--model", model)[0]["tokens"])
    assert trained("--max-length", length - 1, "--overflow", "keep_turns")[0] == both // 2
    assert trained("--max-length", length - 1)[0] == 0


@pytest.mark.parametrize("form", ["jsonl", "saved"])
def test_rows_are_picked_by_number(form: str, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows"
    if form == "jsonl":
        write_jsonl(data, conversations(6))
    else:
        Dataset.from_list(conversations(6)).save_to_disk(str(data))
    assert [row["row"] for row in inspected(data, "--model", model, "--row", "4", "--row", "1")] == [1, 4]
    done = invoke("inspect", data, "--model", model, "--row", "6")
    assert done.exit_code == 2
    assert "has no row 6: it holds 6." in done.stderr


def test_kinds_of_tokens_are_read_off_labels_ids_and_padding() -> None:
    kinds = token_kinds(
        [-100, -100, 7, 2, -100, 8, -100], input_ids=[1, 5, 7, 2, 1, 8, 0], special_ids={0, 1, 2}, stop_ids={2},
        attention_mask=[1, 1, 1, 1, 1, 1, 0],
    )  # fmt: skip
    assert kinds == [
        "special",
        "prompt",
        "trained",
        "stop",
        "special",
        "trained",
        "padding",
    ]  # 8: an answer that was cut


def test_turns_begin_at_headers_and_after_answers() -> None:
    s, e, n = 1, 2, 9
    ids = [s, 5, e, n, s, 6, e, n, s, 5]

    def starts(labels: list[int], opening: int | None, ids: list[int] = ids) -> set[int]:
        return turn_starts(ids, labels, special_ids={s, e}, stop_ids={e}, opening=opening)

    trained, stop_untrained = [-100] * 5 + [6, e] + [-100] * 3, [-100] * 5 + [6] + [-100] * 4
    assert starts(trained, s) == starts(stop_untrained, s) == {0, 4, 8}
    # Without a header that marks turns: after the answer, or at the special token close behind it.
    assert starts(trained, None) == starts(stop_untrained, None) == {0, 8}
    assert starts([-100, 6, 7, -100], None, [5, 6, 7, 5]) == {0, 3}
    assert starts([-100, 6, -100], None, [5, 6, e]) == {0}


@pytest.mark.parametrize("kind", ["bytelevel", "sp-bpe", "sp-bpe-slow", "byt5"])
def test_texts_of_tokens_join_to_the_text_of_the_row(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    text = TextTokenizer(tokenizer)
    said = "Hello  wörld 日本 😀\n\tend"
    (ids,) = text.encode([said])
    texts = token_texts(text, ids)
    assert len(texts) == len(ids)
    assert "".join(texts).removeprefix(" ") == said


# --- rows that are not exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overflow", "code"), [("raise", 1), ("drop", 0), ("keep_turns", 0)])
def test_rows_that_the_overflow_policy_leaves_out_are_no_fault(
    overflow: str, code: int, model: Path, tmp_path: Path
) -> None:
    long = {"messages": [{"role": "user", "content": "so " * 90}, {"role": "assistant", "content": "x"}]}
    data = write_jsonl(tmp_path / "long.jsonl", [*conversations(1), long])
    limits = ("--model", model, "--max-length", "64", "--overflow", overflow)
    done = invoke("inspect", data, *limits)
    assert done.exit_code == code, done.output
    assert ("row 1: left out" in done.stdout) == (code == 0)
    faults = inspected(data, *limits)[1]["faults"]
    assert [fault["asked_for"] for fault in faults] == [code == 0]
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "a", "response": ""}])
    assert invoke("inspect", empty, *limits).exit_code == 1, "another fault stays one"


def test_a_refused_row_is_shown_with_its_code_and_remedy_and_exit_code_1(model: Path, tmp_path: Path) -> None:
    rows = conversations(2)
    rows[1]["messages"][1]["content"] = ""
    done = invoke("inspect", write_jsonl(tmp_path / "rows.jsonl", rows), "--model", model)
    assert done.exit_code == 1
    said = done.stdout
    assert "row 1: refused" in said
    assert "empty_response: " in said
    assert "what to do:" in said.split("empty_response")[1]
    assert invoke("inspect", tmp_path / "rows.jsonl", "--model", model, "--row", "0").exit_code == 0


def test_a_tokenised_row_is_shown_with_its_padding_and_its_faults(model: Path, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")["input_ids"]
    answer = len(tokenizer("yes")["input_ids"])
    labels = [-100] * (len(ids) - 1 - answer) + ids[-1 - answer : -1] + [-100]  # the stop token is not trained
    pad = 3
    row = {
        "input_ids": ids + [ids[-1]] * pad,
        "labels": labels + [-100] * pad,
        "attention_mask": [1] * len(ids) + [0] * pad,
    }
    path = write_jsonl(
        tmp_path / "rows.jsonl", [row, row | {"labels": [1]}, row | {"input_ids": [10**6] * len(row["labels"])}]
    )
    done = invoke("inspect", path, "--model", model)
    assert done.exit_code == 1
    assert "{{padding ×3}}" in done.stdout
    assert "[[yes]]<|im_end|>" in done.stdout
    first, second, third = inspected(path, "--model", model)
    assert [token["kind"] for token in first["tokens"]][-4:] == ["special", "padding", "padding", "padding"]
    assert [fault["code"] for fault in first["faults"]] == ["missing_stop"]
    assert [fault["code"] for fault in second["faults"]] == ["length_mismatch"]
    assert [fault["code"] for fault in third["faults"]] == ["id_out_of_range"]


def test_a_history_that_is_split_is_shown_row_by_row(tmp_path: Path) -> None:
    """Where a template rewrites earlier turns, each row of the conversation is shown under the row's number."""
    tokenizer = build_tokenizer("bytelevel", eos="<|im_end|>")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '(earlier) ' + m['content'])"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": conversations(1)[0]["messages"] * 2}])
    shown = inspected(data, "--model", tmp_path / "model")
    assert [(row["row"], row["part"]) for row in shown] == [(0, 0), (0, 1)]
    assert "row 0 (2. of its rows)" in invoke("inspect", data, "--model", tmp_path / "model").stdout


# --- packed rows ------------------------------------------------------------------------------------------------------


def test_a_packed_row_is_shown_document_by_document(model: Path, packed: Path) -> None:
    lengths = list(Dataset.load_from_disk(str(packed))["seq_lengths"])
    number = next(i for i, row in enumerate(lengths) if len(row) > 1)
    (row,) = inspected(packed, "--model", model, "--row", number)
    assert [end - start for start, end in row["documents"]] == lengths[number]
    assert {start for start, _ in row["documents"]} <= {start for start, _ in row["turns"]}
    assert row["faults"] == []
    said = invoke("inspect", packed, "--model", model, "--row", number).stdout
    assert f"── document 2 of {len(lengths[number])} ──" in said


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(model: Path, packed: Path, tmp_path: Path) -> Path:
    path = tmp_path / "below" / "page.html"
    done = invoke("inspect", packed, "--model", model, "--html", path)
    assert done.exit_code == 0
    return path


@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 420)])
def test_the_page_works_in_a_browser_offline_in_light_and_dark_wide_and_narrow(
    page: Path, dark: bool, width: int
) -> None:
    seen = open_page(page, dark=dark, width=width)
    assert seen.console == []
    assert seen.requests == []
    assert seen.width <= width
    red, green, blue = map(int, re.findall(r"\d+", seen.background)[:3])
    assert (red + green + blue < 200) is dark
    assert "Rows as they will be trained" in seen.text


def test_tokens_and_documents_of_the_page_are_reached_by_keyboard(page: Path, packed: Path) -> None:
    seen = open_page(page)
    lengths = list(Dataset.load_from_disk(str(packed))["seq_lengths"])
    assert sum(stop.tag == "span" for stop in seen.tab_stops) == len(
        lengths
    )  # one per row: arrow keys go on from there
    documents = [stop for stop in seen.tab_stops if stop.words.startswith("document ")]
    assert len(documents) == sum(len(row) for row in lengths if len(row) > 1)
    assert all(stop.ring for stop in seen.tab_stops)


@pytest.mark.parametrize(
    ("act", "index"),
    [
        ("first.focus()", 0),
        ("first.focus(); press('ArrowRight'); press('ArrowRight'); press('ArrowLeft')", 1),
        ("first.focus(); press('ArrowLeft')", 0),
        ("first.focus(); press('End')", -1),
        ("first.focus(); press('End'); press('ArrowRight'); press('Home')", 0),
        ("tokens[5].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))", 5),
    ],
)
def test_focus_and_pointer_tell_id_text_and_label_of_a_token(
    act: str, index: int, page: Path, packed: Path, model: Path
) -> None:
    script = f"""<script>
const tokens = [...document.querySelector(".row").querySelectorAll(".t")], first = tokens[0];
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {{key, bubbles: true}}));
{act};
</script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    seen = open_page(page)
    (row,) = inspected(packed, "--model", model, "--row", "0")
    token = row["tokens"][index]
    label = "−100" if token["label"] == -100 else token["label"]
    number = index % len(row["tokens"])
    text = json.dumps(token["text"], ensure_ascii=False)
    assert seen.console == []
    assert f"token {number} · id {token['id']} · text {text} · label {label} ({NAMES[token['kind']]})" in seen.text


def test_every_token_of_the_page_has_its_id_and_kind(page: Path, packed: Path, model: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<span class="t (\w+)" tabindex="-1" data-i="(\d+)">', text)
    shown = inspected(packed, "--model", model, "--count", "20")
    assert found == [(token["kind"], str(token["id"])) for row in shown for token in row["tokens"]]
    assert text.count("<polygon") == sum(len(row["documents"]) for row in shown if len(row["documents"]) > 1)


def test_markup_in_the_data_is_text_on_the_page(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "<script>alert(1)</script> </script>", "response": "<b>\x1b[31m&amp;"}]
    path = tmp_path / "page.html"
    assert (
        invoke("inspect", write_jsonl(tmp_path / "rows.jsonl", rows), "--model", model, "--html", path).exit_code == 0
    )
    seen = open_page(path)
    assert seen.console == []
    assert "<script>alert(1)</script>" in seen.text
    assert "<b>\\x1b[31m&amp;" in seen.text


def test_a_page_that_cannot_be_written_is_refused(model: Path, data: Path) -> None:
    done = invoke("inspect", data, "--model", model, "--html", data / "below" / "page.html", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "unwritable"
