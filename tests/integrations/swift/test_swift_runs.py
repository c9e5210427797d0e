"""Runs of ms-swift on the CPU, a LoRA of a tiny model: what its own data loader gives are the rows of `sft-plugins mask`.

`make test-swift` runs these in ms-swift's environment; elsewhere they are skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

swift = pytest.importorskip("swift", reason="ms-swift has an environment of its own: make test-swift")

from datasets import Dataset, load_from_disk  # noqa: E402
from swift.callbacks import TrainerCallback, callbacks_map  # noqa: E402
from swift.pipelines import sft_main  # noqa: E402
from swift.template import Template  # noqa: E402

from sft_plugins.errors import SFTPluginsError  # noqa: E402
from sft_plugins.integrations.swift import register  # noqa: E402
from sft_plugins.masking import PromptMasker, mask_dataset  # noqa: E402
from testkit.commands import chat_tokenizer, conversations, invoke, write_jsonl  # noqa: E402
from testkit.tiny_training import save_tiny_llama  # noqa: E402

COUNT = 24
ROOT = Path(__file__).resolve().parents[3]
OPTIONS = {
    "model_type": "llama", "template": "chatml", "tuner_type": "lora", "max_steps": 2, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "torch_dtype": "float32", "gradient_checkpointing": "false", "report_to": "none",
    "save_strategy": "no", "check_model": "false", "dataset_num_proc": 1, "dataloader_num_workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of 24 conversations as the command writes them: `masked`, `packed`."""
    folder = tmp_path_factory.mktemp("desk")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    save_tiny_llama(folder / "model", chat_tokenizer(), **sizes)
    data = write_jsonl(folder / "rows.jsonl", conversations(COUNT))
    for name, more in (("masked", ()), ("packed", ("--pack", 128))):
        done = invoke("mask", data, "-m", folder / "model", "--to", "swift", "--output", folder / name, *more)
        assert done.exit_code == 0, done.output
    return folder


class Capture(TrainerCallback):
    """Keeps what the live data loader gives for an epoch, and the loss that the trainer computes of each batch."""

    batches: list[dict[str, Any]]
    losses: list[tuple[float, float]]
    steps: int

    def on_train_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        cls = type(self)
        cls.batches, cls.losses, cls.steps = [], [], 0
        for batch in train_dataloader:
            kept = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
            cls.batches.append(kept)
            documents = split(kept)
            with torch.no_grad():
                model = self.trainer.model
                model.eval()
                prepared = self.trainer._prepare_inputs(dict(batch))
                loss = float(self.trainer.compute_loss(model, prepared))
                alone = [
                    F.cross_entropy(
                        model(input_ids=ids[None], use_cache=False).logits[0, :-1], labels[1:], reduction="sum"
                    )
                    for ids, labels in documents
                ]
                model.train()
            tokens = sum(int((labels[1:] != -100).sum()) for _, labels in documents)
            cls.losses.append((loss, float(sum(alone)) / tokens))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        type(self).steps += 1


def split(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of each document of a batch, padding left out."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" in batch and "attention_mask" not in batch:
        starts = [*torch.nonzero(batch["position_ids"][0] == 0)[:, 0].tolist(), ids.shape[1]]
        spans = [(0, slice(a, b)) for a, b in pairwise(starts)]
    else:
        spans = [(i, slice(0, int(mask.sum()))) for i, mask in enumerate(batch["attention_mask"])]
    return [(ids[row, span], labels[row, span]) for row, span in spans]


@pytest.fixture
def train(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`swift sft` on a folder of rows, in this process, with the plug-in's callback and one that keeps the batches."""
    monkeypatch.setitem(callbacks_map, "capture", lambda args, trainer: Capture(args, trainer))
    before = dict(os.environ)

    def run(name: str | None, *, callbacks: tuple[str, ...] = ("sft_plugins", "capture"), **changes: Any) -> Any:
        Capture.steps = 0
        options = {**OPTIONS, "model": desk / "model", "output_dir": tmp_path / "out", **changes}
        if name is not None:
            options = {"cached_dataset": desk / name / "rows", **options}
        arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return sft_main([*arguments, *(("--callbacks", *callbacks) if callbacks else ())])

    yield run
    os.environ.clear()
    os.environ.update(before)


def seen() -> list[tuple[list[int], list[int]]]:
    return sorted((ids.tolist(), labels.tolist()) for batch in Capture.batches for ids, labels in split(batch))


def wanted() -> list[tuple[list[int], list[int]]]:
    made = mask_dataset(Dataset.from_list(conversations(COUNT)), PromptMasker(chat_tokenizer())).dataset
    return sorted(zip(made["input_ids"][:], made["labels"][:], strict=True))


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_rows_arrive_unchanged_in_the_data_loader_of_the_host(train: Any) -> None:
    register()
    train("masked")
    assert seen() == wanted()
    assert set(Capture.batches[0]) == {"input_ids", "labels", "attention_mask"}
    for loss, alone in Capture.losses:
        assert loss == pytest.approx(alone, rel=1e-5)
    assert Capture.steps == 2


def test_packed_rows_arrive_whole_and_no_document_sees_another(train: Any) -> None:
    """The loss of a batch is that of its documents run alone."""
    register()
    train("packed")
    assert seen() == wanted()
    assert len(Capture.batches) < COUNT / 2 / 2  # packed
    assert "attention_mask" not in Capture.batches[0]
    for loss, alone in Capture.losses:
        assert loss == pytest.approx(alone, rel=1e-5)


def test_the_commands_of_the_page_train_with_the_plugin_file_of_configs(
    train: Any, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, but for what a CPU takes, and with a short watch."""
    page, plugin = (ROOT / "docs" / "ms-swift.md").read_text(), (ROOT / "configs" / "swift_plugin.py").read_text()
    code = re.search(r"```python\n(.*?)```", page, flags=re.S)
    assert code is not None
    assert [line for line in code[1].splitlines() if line] == [
        line for line in plugin.partition('"""\n\n')[2].splitlines() if line and not line.startswith("#")
    ]
    mask, swift_sft = re.findall(r"^(?:sft-plugins mask|swift sft) .*$", page, flags=re.M)[:2]
    assert plugin.count(mask) == plugin.count(swift_sft) == 1
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "conversations.jsonl", conversations(COUNT))
    (tmp_path / "model").symlink_to(desk / "model")
    (tmp_path / "configs").mkdir()
    short = (
        '{"prompts": ["Say hi.", "Tell a story."], "samples_per_prompt": 2, "max_new_tokens": 4, "embedder": "model"}'
    )
    (tmp_path / "configs" / "swift_plugin.py").write_text(plugin.replace("watch=True)", f"watch={short})"))
    assert invoke(*mask.split()[1:]).exit_code == 0
    options = {**OPTIONS, "output_dir": "out", "logging_steps": 1}
    sft_main([*swift_sft.split()[2:], *(word for key, value in options.items() for word in (f"--{key}", str(value)))])
    (history,) = (tmp_path / "out").glob("*/collapse/history.jsonl")
    assert len(history.read_text().splitlines()) > 2
    (log,) = (tmp_path / "out").glob("*/logging.jsonl")
    assert "collapse/" in log.read_text()


# --- what is refused before the first step ----------------------------------------------------------------------------


def refused(run: Callable[[], Any], code: str, words: str) -> None:
    Capture.steps = 0
    with pytest.raises(SFTPluginsError, match=words) as error:
        run()
    assert error.value.code == code
    assert Capture.steps == 0


@pytest.mark.parametrize("name", ["masked", "packed"])
def test_a_host_that_reads_rows_otherwise_is_stopped(name: str, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that one release shifts, say."""
    register()
    encode = Template.encode

    def shifts(self: Any, inputs: Any, **options: Any) -> Any:
        row = encode(self, inputs, **options)
        row["labels"] = [-100, *row["labels"][:-1]]
        return row

    monkeypatch.setattr(Template, "encode", shifts)
    code = "host_dataset" if name == "masked" else "label_mismatch"  # our own collator sees it first
    refused(lambda: train(name), code, "differ between the data loader and the disk" if name == "masked" else "label")


def test_a_row_that_the_host_puts_in_the_place_of_another_is_seen(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `LazyLLMDataset` does when its template refuses a row."""
    register()
    encode, calls = Template.encode, [0]

    def fails_now_and_then(self: Any, inputs: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise ValueError("no")
        return encode(self, inputs, **options)

    monkeypatch.setattr(Template, "encode", fails_now_and_then)
    refused(lambda: train("masked"), "host_dataset", "differ between the data loader and the disk")


def test_rows_that_a_limit_leaves_out_are_missed(train: Any) -> None:
    register()
    refused(lambda: train("masked", max_length=40), "host_dataset", r"of the 24 rows .* are trained.*--max_length")


def test_rows_of_another_tokenizer_are_refused(train: Any, desk: Path, tmp_path: Path) -> None:
    register()
    tokenizer = chat_tokenizer().from_pretrained(desk / "model")
    tokenizer.add_tokens(["<another>"])
    model = save_tiny_llama(tmp_path / "other", tokenizer, hidden_size=32, num_attention_heads=4)
    refused(lambda: train("masked", model=model), "host_dataset", "for another tokenizer")


def test_rows_without_their_manifest_are_refused(train: Any, desk: Path, tmp_path: Path) -> None:
    register()
    load_from_disk(str(desk / "masked" / "rows")).save_to_disk(str(tmp_path / "rows"))
    refused(lambda: train(None, cached_dataset=tmp_path / "rows"), "host_dataset", "has no manifest.json")


def test_conversations_are_no_rows_that_could_be_looked_at(train: Any, desk: Path) -> None:
    """Nor do they stand beside rows of ours: ms-swift itself does not join the two."""
    register()
    run = lambda: train(None, dataset=desk / "rows.jsonl")  # noqa: E731
    refused(run, "host_dataset", "not from `--cached_dataset` alone")
    with pytest.raises(ValueError, match="features can't be aligned"):
        train("masked", dataset=desk / "rows.jsonl")


@pytest.mark.parametrize(("name", "code"), [("masked", "host_collator"), ("packed", "host_collator")])
def test_rows_are_not_trained_where_nothing_looks_at_them(name: str, code: str, train: Any) -> None:
    """The plug-in's file without its callback: packed rows would be read as single documents."""
    register()
    refused(lambda: train(name, callbacks=("capture",)), code, "--callbacks sft_plugins")


def test_evaluation_rows_that_are_not_packed_beside_packed_ones_are_refused_at_the_start(
    train: Any, desk: Path
) -> None:
    register()
    run = lambda: train("packed", cached_val_dataset=desk / "masked" / "rows", eval_strategy="steps", eval_steps=1)  # noqa: E731
    refused(run, "bad_schema", "evaluation rows are not")


def test_without_the_plugin_no_row_of_ours_is_trained(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ms-swift takes the rows for conversations, and finds none."""
    for name in ("encode", "data_collator"):
        monkeypatch.setattr(Template, name, getattr(Template, name).__wrapped__)
    with pytest.raises(ValueError, match="Failed to retrieve the dataset"):
        train("masked", callbacks=())


# --- parts ------------------------------------------------------------------------------------------------------------


def test_conversations_are_tokenised_by_the_host_as_ever(train: Any, desk: Path) -> None:
    """With the plug-in's file read, and no row of ours."""
    register()
    train(None, dataset=desk / "rows.jsonl", callbacks=("capture",))
    assert len(seen()) == COUNT
    assert Capture.steps == 2


def test_registering_twice_wraps_once() -> None:
    register()
    encode = Template.encode
    register()
    assert Template.encode is encode


def test_an_unknown_form_of_the_hosts_methods_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Template, "encode", lambda self, inputs, mode: None)
    with pytest.raises(
        SFTPluginsError, match="takes inputs, mode; known is inputs, return_template_inputs, return_length"
    ):
        register()


def test_a_watch_of_another_kind_is_refused() -> None:
    with pytest.raises(SFTPluginsError, match="watch is 'yes'; expected True, False or a mapping"):
        register(watch="yes")  # type: ignore[arg-type]
