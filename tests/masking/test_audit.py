"""`check_masks`: each planted fault is found under its code and no other, and exact rows are silent."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from datasets import Dataset

from sft_plugins.errors import MaskingError
from sft_plugins.masking import PromptMasker, check_masks
from testkit.conversations import BY_NAME, assistant, system, user
from testkit.mask_oracle import IGNORE, runs
from testkit.tokenizers import build_tokenizer, template_names, tokenizer_for_template

ROW = {"messages": [system("Be kind."), user("Hi"), assistant("Hello!"), user("Bye"), assistant("Bye!")]}


@functools.cache
def tokenizer_of(kind: str = "llama3") -> Any:
    return build_tokenizer(kind)


def exact(kind: str = "llama3") -> dict[str, list[int]]:
    (made,) = PromptMasker(tokenizer_of(kind)).encode(ROW)
    return {"input_ids": list(made.input_ids), "labels": list(made.labels)}


def _first_label(row: dict[str, Any]) -> None:
    # A lone EOS in front is an answer of one stop token: nothing but its place is wrong.
    eos = tokenizer_of().eos_token_id
    row["input_ids"].insert(0, eos)
    row["labels"].insert(0, eos)


def _nothing_supervised(row: dict[str, Any]) -> None:
    row["labels"] = [IGNORE] * len(row["input_ids"])


def _other_label(row: dict[str, Any]) -> None:
    at = runs(row["labels"])[0][0]
    row["labels"][at] += 1


def _short_labels(row: dict[str, Any]) -> None:
    row["labels"].pop()


def _short_mask(row: dict[str, Any]) -> None:
    row["assistant_masks"] = [int(label != IGNORE) for label in row.pop("labels")][:-1]


def _id_out_of_range(row: dict[str, Any]) -> None:
    row["input_ids"][1] = len(tokenizer_of())


def _two_bos(row: dict[str, Any]) -> None:
    row["input_ids"][:0] = [tokenizer_of().bos_token_id] * 2
    row["labels"][:0] = [IGNORE] * 2


def _no_stop(row: dict[str, Any]) -> None:
    row["labels"][runs(row["labels"])[-1][1] - 1] = IGNORE


def _newline_trained(row: dict[str, Any]) -> None:
    end = runs(row["labels"])[0][1]
    row["labels"][end] = row["input_ids"][end]


def _header_trained(row: dict[str, Any]) -> None:
    start = runs(row["labels"])[0][0]
    opening = tokenizer_of().convert_tokens_to_ids("<|im_start|>")
    at = max(i for i in range(start) if row["input_ids"][i] == opening)
    row["labels"][at:start] = row["input_ids"][at:start]


def _turn_forgotten(row: dict[str, Any]) -> None:
    start, end = runs(row["labels"])[0]
    row["labels"][start:end] = [IGNORE] * (end - start)


FAULTS: dict[Any, str] = {
    _first_label: "first_label",
    _nothing_supervised: "no_supervised_tokens",
    _other_label: "label_mismatch",
    _short_labels: "length_mismatch",
    _short_mask: "length_mismatch",
    _id_out_of_range: "id_out_of_range",
    _two_bos: "double_bos",
    _no_stop: "missing_stop",
    _newline_trained: "missing_stop",
    _header_trained: "prompt_supervised",
    _turn_forgotten: "unsupervised_turn",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_planted_fault_is_found_under_its_code_alone(fault: Any) -> None:
    bad = exact()
    fault(bad)
    report = check_masks([exact(), bad, exact()], tokenizer_of())
    assert {code: found.first_rows for code, found in report.failures.items()} == {FAULTS[fault]: [1]}
    assert report.failures[FAULTS[fault]].count == 1
    assert report.rows_in == 3
    assert FAULTS[fault] in str(report)


def test_faults_of_many_rows_are_counted_together() -> None:
    rows = []
    for fault in [*FAULTS, *FAULTS]:
        row = exact()
        fault(row)
        rows.append(row)
    failures = check_masks(rows, tokenizer_of()).failures
    assert {code: one.count for code, one in failures.items()} == {
        code: 2 * list(FAULTS.values()).count(code) for code in FAULTS.values()
    }


@pytest.mark.parametrize(
    "row",
    [{"messages": []}, {"input_ids": [5, 6]}, {"input_ids": [[5]], "labels": [[5]]}, {"input_ids": None, "labels": None},
     {"input_ids": [5, 6], "completion_mask": [0, 3]}],
    ids=["raw", "no_labels", "nested", "none", "mask_of_threes"],
)  # fmt: skip
def test_rows_of_another_form_are_counted_not_raised(row: dict[str, Any]) -> None:
    report = check_masks([row, exact()], tokenizer_of())
    assert {code: found.first_rows for code, found in report.failures.items()} == {"bad_schema": [0]}
    assert report.rows_out == 1


@pytest.mark.parametrize(
    "kind",
    ["bytelevel", "qwen", "merging", "llama3", "sp-bpe", "sp-bpe-slow", "sp-nodummy", "unigram", "byt5"],
)
def test_exact_rows_are_silent(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    masker = PromptMasker(tokenizer, errors="drop")
    rows = [
        {"input_ids": made.input_ids, "labels": made.labels}
        for name in (
            "one_turn",
            "many_turns",
            "system",
            "multi_line",
            "consecutive_assistants",
            "repeated_answer",
            "code",
        )
        for made in masker.encode(BY_NAME[name].for_tokenizer(""))
    ]
    assert len(rows) >= 6
    report = check_masks(Dataset.from_list(rows), tokenizer)
    assert report.failures == {}
    assert report.ok
    assert report.rows_out == len(rows)
    assert report.tokens == sum(len(row["input_ids"]) for row in rows)
    assert report.supervised_tokens == sum(label != IGNORE for row in rows for label in row["labels"])


def test_exact_rows_of_real_templates_are_silent() -> None:
    checked = 0
    for name in template_names():
        tokenizer = tokenizer_for_template(name)
        masker = PromptMasker(tokenizer, errors="drop")
        rows = [
            {"input_ids": made.input_ids, "labels": made.labels}
            for key in ("many_turns", "text_parts")
            for made in masker.encode(BY_NAME[key].for_tokenizer(""))
        ]
        # A template that splits the history leaves earlier turns of a row untrained, on purpose.
        rows = [row for row in rows if len(runs(row["labels"])) == 4]
        if rows:
            checked += 1
            assert check_masks(rows, tokenizer).failures == {}, name
        made = (one for key in ("tools", "reasoning_content") for one in masker.encode(BY_NAME[key].row))
        rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in made]
        assert not rows or set(check_masks(rows, tokenizer).failures) <= {"unsupervised_turn"}, name
    assert checked >= min(20, 0.3 * len(template_names()))


def test_masks_count_as_labels_do() -> None:
    row = exact()
    mask = [int(label != IGNORE) for label in row["labels"]]
    for columns in ({"assistant_masks": mask}, {"completion_mask": mask}, {"labels": row["labels"]}):
        report = check_masks([{"input_ids": row["input_ids"], **columns}], tokenizer_of())
        assert report.ok
        assert report.supervised_tokens == sum(mask)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_the_rows_of_a_split_history_are_no_fault_together_and_one_alone(order: list[int]) -> None:
    """Qwen 3 strips earlier reasoning, so each answer has a row of its own, in which those before it carry no loss."""
    tokenizer = tokenizer_for_template("qwen3")
    row = {"messages": [message for i in range(3) for message in (user(f"Question {i}"), assistant(f"Answer {i}"))]}
    made = [{"input_ids": one.input_ids, "labels": one.labels} for one in PromptMasker(tokenizer).encode(row)]
    assert len(made) == 3
    report = check_masks([made[i] for i in order], tokenizer)
    assert report.failures == {}
    assert any("split history" in note for note in report.notes)
    for left_out in (0, 1):
        rows = [made[i] for i in order if i != left_out]
        failures = check_masks(rows, tokenizer).failures
        assert {code: found.first_rows for code, found in failures.items()} == {
            "unsupervised_turn": [i for i, one in enumerate(rows) if made.index(one) > left_out]
        }


def test_packed_rows_are_checked_document_by_document() -> None:
    """Read as one document, a packed row would hide all first labels but its own."""
    good, bad = exact(), exact()
    _first_label(bad)

    def packed(*documents: dict[str, list[int]]) -> dict[str, list[int]]:
        joined = {name: [token for document in documents for token in document[name]] for name in good}
        return joined | {"seq_lengths": [len(document["input_ids"]) for document in documents]}

    rows = [packed(good, good), packed(good, bad, good), packed(good) | {"seq_lengths": [1, 1]}]
    report = check_masks(rows, tokenizer_of())
    assert {code: (found.count, found.first_rows) for code, found in report.failures.items()} == {
        "first_label": (1, [1]),
        "boundaries": (1, [2]),
    }
    assert (report.rows_in, report.rows_out) == (3, 5)
    assert any("packed" in note for note in report.notes)


def test_what_cannot_be_checked_is_said() -> None:
    tokenizer = build_tokenizer("qwen", chat_template=None)
    eos = tokenizer.eos_token_id
    report = check_masks([{"input_ids": [5, 6, eos], "labels": [IGNORE, 6, eos]}], tokenizer)
    assert report.ok
    assert any("turns were not checked" in note for note in report.notes)


def test_no_rows_are_refused() -> None:
    for rows in ([], Dataset.from_list([])):
        with pytest.raises(MaskingError, match="no rows") as caught:
            check_masks(rows, tokenizer_of())
        assert caught.value.code == "empty_dataset"


# --- headers that the model writes itself -------------------------------------------------------------------------------


def reasoned(key: str) -> dict[str, Any]:
    answers = assistant("42.", **{key: "Six times seven."}), assistant("48.", **{key: "Six more."})
    return {"messages": [user("What is 6 * 7?"), answers[0], user("And 6 * 8?"), answers[1]]}


OWN_HEADERS = {
    "gptoss": reasoned("thinking"),
    "muse_glimmer": reasoned("reasoning_content"),
    "diffusion_gemma": BY_NAME["tools"].row,
}


def masked(template: str, row: dict[str, Any]) -> tuple[Any, list[dict[str, list[int]]]]:
    tokenizer = tokenizer_for_template(template)
    rows = PromptMasker(tokenizer).encode(row)
    return tokenizer, [{"input_ids": one.input_ids, "labels": one.labels} for one in rows]


@pytest.mark.parametrize("template", OWN_HEADERS)
def test_a_header_that_the_model_writes_itself_may_carry_loss(template: str) -> None:
    tokenizer, rows = masked(template, OWN_HEADERS[template])
    openings = {id for row in rows for id in row["labels"]} & set(
        tokenizer(["<|start|>", "<|turn>"][template[0] == "d"]).input_ids
    )
    assert openings, "the rows hold no such header"
    assert "prompt_supervised" not in check_masks(rows, tokenizer).failures


@pytest.mark.parametrize("template", OWN_HEADERS)
def test_any_other_header_may_not(template: str) -> None:
    """The whole row trained; the header of each turn alone; of an answer behind an answer."""
    tokenizer, rows = masked(template, OWN_HEADERS[template])
    whole = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in rows]
    assert check_masks(whole, tokenizer).failures["prompt_supervised"].count == len(rows)
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        starts = [i for i in range(1, len(ids)) if labels[i] != -100 and labels[i - 1] == -100]
        header = next(i for i in range(starts[0] - 1, 0, -1) if tokenizer.decode([ids[i]]) in ("<|start|>", "<|turn>"))
        early = [ids[i] if header <= i < starts[0] else label for i, label in enumerate(labels)]
        assert "prompt_supervised" in check_masks([{"input_ids": ids, "labels": early}], tokenizer).failures


def test_an_answer_behind_a_final_answer_begins_with_a_header_of_the_templates() -> None:
    """gpt-oss writes a header behind its analysis, and stops behind its answer."""
    tokenizer, (row,) = masked("gptoss", {"messages": [user("a"), assistant("b")]})
    again = tokenizer(
        "<|end|><|start|>assistant<|channel|>final<|message|>c<|return|>", add_special_tokens=False
    ).input_ids
    ids = row["input_ids"][:-1] + again
    report = check_masks([{"input_ids": ids, "labels": row["labels"][:-1] + again}], tokenizer)
    assert "prompt_supervised" in report.failures
