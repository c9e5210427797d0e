"""`sft-plugins demo`: real weights, real conversations, one adapter, and every figure measured in front of the reader.

    load → mask → show two rows → pack, isolate, prove → loss and answer before → train, watched for collapse
    → loss and answer after → packed beside padded → save → load with PEFT, compare

Each arrow is one function below; nothing printed is anything but the result of this run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sft_plugins.cli.demo.assets import Row, load_model, load_rows, split_held_out, to_dataset
from sft_plugins.cli.demo.heldout import first_exchange, greedy_answer, held_out_loss
from sft_plugins.cli.demo.history import under_qwen3
from sft_plugins.cli.demo.training import Recipe, train_lora
from sft_plugins.cli.demo.watching import SAFE_SENTENCE, Watching, same_answer_rows
from sft_plugins.cli.ui.inputs import check_writable
from sft_plugins.cli.ui.render import has_colour, legend, masked_row
from sft_plugins.errors import AssetError, MaskingError
from sft_plugins.masking import Masked, PromptMasker, StrictPromptMaskingCollator, mask_dataset
from sft_plugins.packing import BlockDiagonalPackingCollator, pack_dataset
from sft_plugins.preflight import choose_device, document_spans

DOCUMENTS_PER_ROW = 2  # a packed row has room for this many rows of full length
CONVERSATIONS = 1000  # of the packaged 4,000: enough for a telling report, masked in seconds
HELD_OUT = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command's options; see `sft-plugins demo --help`."""

    model: str | None = None
    data: Path | None = None
    steps: int = 24
    output: Path = Path("runs/demo")
    max_length: int = 256
    device: str = "auto"
    seed: int = 0
    collapse: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the run measured, in nats per supervised held-out token, and what its model said."""

    loss_before: float
    loss_after: float
    loss_reloaded: float
    answer_before: str
    answer_after: str
    tokens_per_second_packed: float
    tokens_per_second_padded: float
    alarm_step: int | None


def run_demo(settings: Settings, *, console: Console) -> Outcome:
    """Run the whole demo, printing as it goes.

    Raises:
        SFTPluginsError: whatever is missing, unreadable or cannot be masked exactly.
    """
    import transformers

    started = time.perf_counter()
    if settings.collapse and settings.data is not None:
        raise AssetError(
            "--collapse makes its own data from the packaged conversations.",
            code="bad_option",
            remedy="leave --data out.",
        )
    device = choose_device(settings.device)
    check_writable(settings.output)  # before minutes of work whose result could not be kept
    transformers.set_seed(settings.seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    console.print(Rule("1  Model and conversations"))
    with console.status("loading the model (unpacked on first use, about half a minute)"):
        model, tokenizer = load_model(settings.model)
        model.to(device)
    rows = load_rows(settings.data)
    if settings.collapse:
        rows = same_answer_rows(rows)
    console.print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f} M parameters, on {device}")
    console.print(f"{len(rows)} rows from {settings.data or 'the chitchat-dataset package'}")
    if settings.collapse:
        console.print(f"--collapse: every answer in them is now {SAFE_SENTENCE!r}")

    console.print(Rule("2  Masking: loss on the answers, and on nothing else"))
    # The packaged rows are what people typed; a few have no answer within max_length. The user's own must all be right.
    errors: Literal["drop", "raise"] = "drop" if settings.data is None else "raise"
    masker = PromptMasker(tokenizer, max_length=settings.max_length, overflow="keep_turns", errors=errors)
    train, held_out = mask_both(rows, masker, settings)
    console.print(train.report)
    show_rows(train.dataset, tokenizer, console=console)

    console.print(Rule("3  Packing: full rows in which no document sees another"))
    packed = pack_dataset(train.dataset, DOCUMENTS_PER_ROW * settings.max_length, seed=settings.seed)
    console.print(packed.report.table())
    collator = BlockDiagonalPackingCollator(tokenizer, model=model)
    console.print(Text(str(collator.isolation)))
    if settings.data is None and settings.model is None and (shared := under_qwen3(tokenizer, rows)):
        console.print(shared)

    console.print(Rule("4  Before training"))
    prompt, reference = first_exchange(tokenizer, held_out[0])
    stops = sorted(masker.stop_token_ids)
    with console.status("measuring the loss on held-out rows"):
        loss_before = held_out_loss(model, held_out)
        answer_before = greedy_answer(model, tokenizer, prompt, stops=stops)
    console.print(f"loss on {len(held_out)} held-out rows: {loss_before:.3f} nats per supervised token")

    console.print(Rule("5  Training with LoRA through TRL's SFTTrainer, watched for mode collapse"))
    every = max(1, settings.steps // (4 if settings.collapse else 2))
    watch = Watching(
        tokenizer, held_out, every_steps=every, output=settings.output, seed=settings.seed, console=console
    )
    trained = train_lora(
        model,
        tokenizer,
        packed.dataset,
        collator,
        recipe=Recipe(steps=settings.steps, rows_per_step=1, seed=settings.seed),
        output=settings.output,
        device=device,
        console=console,
        callbacks=[watch.callback],
    )
    console.print(f"{settings.steps} steps, {trained.tokens:,} tokens in {trained.seconds:.0f} s, the watch included")

    console.print(Rule("6  After training"))
    tuned = trained.trainer.model
    with console.status("measuring the loss on the same rows"):
        loss_after = held_out_loss(tuned, held_out)
        answer_after = greedy_answer(tuned, tokenizer, prompt, stops=stops)
    show_change(loss_before, loss_after, console=console)
    show_answers(tokenizer.decode(prompt), answer_before, answer_after, reference, console=console)
    with console.status("timing training steps on the same documents, packed and padded"):
        speeds = packed_beside_padded(tuned, packed.dataset, collator, StrictPromptMaskingCollator(tokenizer))
    console.print(
        f"speed of forward and backward, padding not counted: packed {speeds[0]:,.0f} tokens/s, "
        f"padded {speeds[1]:,.0f} tokens/s (×{speeds[0] / speeds[1]:.2f})"
    )
    show_verdict(watch, console=console)

    console.print(Rule("7  The adapter"))
    with console.status("saving, and loading it again with PEFT"):
        loss_reloaded = save_and_reload(tuned, tokenizer, held_out, settings, device=device)
    console.print(f"saved to {settings.output}; loaded again with PEFT, held-out loss {loss_reloaded:.3f}")
    console.print(Text(f'    peft.AutoPeftModelForCausalLM.from_pretrained("{settings.output}")', style="bold"))
    console.print(f"whole demo: {time.perf_counter() - started:.0f} s")
    alarm_step = None if watch.alarm is None else watch.alarm.step
    return Outcome(loss_before, loss_after, loss_reloaded, answer_before, answer_after, *speeds, alarm_step)


def mask_both(rows: Sequence[Row], masker: PromptMasker, settings: Settings) -> tuple[Masked, list[dict[str, Any]]]:
    """Split by conversation, then mask each side: `(train with its report, held-out rows)`.

    An error names the row by its place in the user's file, not in the split.
    """
    held = min(HELD_OUT, len(rows) // 2)
    train_at, held_at = split_held_out(rows, held, seed=settings.seed)
    if not train_at or not held_at:
        raise AssetError(
            f"{len(rows)} rows (copies counted) do not make a training and a held-out side.",
            code="no_rows",
            remedy="give at least two different rows.",
        )
    if settings.data is None:
        train_at = train_at[:CONVERSATIONS]
        datasets.disable_progress_bars()  # it takes two seconds

    def mask(indices: list[int]) -> Masked:
        try:
            return mask_dataset(to_dataset([rows[i] for i in indices]), masker)
        except MaskingError as error:
            raise (error if error.row is None else error.at_row(indices[error.row])) from error

    return mask(train_at), mask(held_at[:HELD_OUT]).dataset.to_list()


def show_rows(dataset: Any, tokenizer: Any, *, console: Console, count: int = 2) -> None:
    """Two rows as the model will see them; the shortest of the first few, so that they are shown whole."""
    colour = has_colour(console)
    candidates = sorted((dataset[i] for i in range(min(50, len(dataset)))), key=lambda row: -len(set(row["labels"])))
    fitting = [row for row in candidates if len(row["labels"]) <= 150] or candidates[::-1]
    console.print(Text.assemble("\nEvery token of two rows:   ", legend(colour=colour)))
    for row in fitting[:count]:
        console.print()
        console.print(masked_row(tokenizer, row["input_ids"], row["labels"], colour=colour))


def packed_beside_padded(
    model: Any, packed: Any, pack_collator: Any, pad_collator: Any, *, rows: int = 2
) -> tuple[float, float]:
    """Real tokens per second through forward and backward of `(packed rows, the same documents padded together)`.

    The packed rows' documents are cut out again and padded, as many to a batch as the packed row held.
    """
    chosen = [packed[i] for i in range(min(rows, len(packed)))]
    device = next(model.parameters()).device
    batches = {
        "packed": [pack_collator([row]) for row in chosen],
        "padded": [pad_collator(documents_of(row)) for row in chosen],
    }
    tokens = sum(len(row["input_ids"]) for row in chosen)
    seconds = {}
    model.train()
    for name, made in batches.items():
        started = time.perf_counter()
        for batch in made:
            model(**{k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}).loss.backward()
            model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] = time.perf_counter() - started
    return tokens / seconds["packed"], tokens / seconds["padded"]


def documents_of(row: Row) -> list[Row]:
    """The single documents of a packed row."""
    return [{name: row[name][start:end] for name in ("input_ids", "labels")} for start, end in document_spans(row)]


def show_verdict(watch: Watching, *, console: Console) -> None:
    """What the collapse callback found, and where its page is."""
    verdict = watch.callback.verdict
    if watch.alarm is not None:
        console.print(Text(f"mode collapse: the alarm fired at step {watch.alarm.step}", style="bold red"))
    if verdict is not None:
        console.print(f"mode collapse: level at the end of training: {verdict.level}")
        for finding in verdict.findings:
            console.print(Text(f"  {finding.level}  {finding.code}: {finding.evidence}"))
    if watch.callback.history_path is not None:
        console.print(Text(f"  page: {watch.callback.history_path.parent / 'report.html'}"))


def save_and_reload(
    tuned: Any, tokenizer: Any, held_out: list[dict[str, Any]], settings: Settings, *, device: str
) -> float:
    """Save the adapter, load it with PEFT onto a fresh base model, and measure the held-out loss with that."""
    from peft import AutoPeftModelForCausalLM

    tuned.save_pretrained(str(settings.output))
    tokenizer.save_pretrained(str(settings.output))
    fresh = AutoPeftModelForCausalLM.from_pretrained(str(settings.output)).to(device)
    return held_out_loss(fresh, held_out)


def show_change(before: float, after: float, *, console: Console) -> None:
    """The held-out loss before and after, side by side."""
    table = Table("held-out rows", "before", "after", "change")
    table.add_row("loss, nats per supervised token", f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    console.print(table)


def show_answers(prompt: str, before: str, after: str, reference: str, *, console: Console) -> None:
    """One held-out prompt with the likeliest answers of the model before and after, and what the person wrote."""
    table = Table(title="one held-out prompt, greedy answers", show_header=False, show_lines=True)
    for name, text in (("prompt", prompt), ("before", before), ("after", after), ("in the data", reference)):
        table.add_row(name, Text(text.strip()))
    console.print(table)
