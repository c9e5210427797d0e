"""`sft-plugins demo`: real weights, real conversations, one adapter, and every figure measured in front of the reader.

    load → mask → show two rows → loss and answer before → train → loss and answer after → save → load with PEFT, compare

Each arrow is one function below; nothing printed is anything but the result of this run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sft_plugins.cli.assets import Row, load_model, load_rows, split_held_out, to_dataset
from sft_plugins.cli.errors import AssetError
from sft_plugins.cli.heldout import first_exchange, greedy_answer, held_out_loss
from sft_plugins.cli.render import has_colour, legend, masked_row
from sft_plugins.errors import MaskingError
from sft_plugins.masking import Masked, PromptMasker, StrictPromptMaskingCollator, mask_dataset

if TYPE_CHECKING:
    from sft_plugins.cli.training import Trained

ROWS_PER_STEP = 4
CONVERSATIONS = 1000  # of the packaged 4,000: enough for a telling report, masked in seconds
HELD_OUT = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command's options; see `sft-plugins demo --help`."""

    model: str | None = None
    data: Path | None = None
    steps: int = 40
    output: Path = Path("runs/demo")
    max_length: int = 256
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What the run measured, in nats per supervised held-out token, and what its model said."""

    loss_before: float
    loss_after: float
    loss_reloaded: float
    answer_before: str
    answer_after: str


def run_demo(settings: Settings, *, console: Console) -> Outcome:
    """Run the whole demo, printing as it goes.

    Raises:
        SFTPluginsError: whatever is missing, unreadable or cannot be masked exactly.
    """
    import transformers

    started = time.perf_counter()
    device = choose_device(settings.device)
    make_folder(settings.output)  # before minutes of work whose result could not be kept
    transformers.set_seed(settings.seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    console.print(Rule("1  Model and conversations"))
    with console.status("loading the model (unpacked on first use, about half a minute)"):
        model, tokenizer = load_model(settings.model)
        model.to(device)
    rows = load_rows(settings.data)
    console.print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f} M parameters, on {device}")
    console.print(f"{len(rows)} rows from {settings.data or 'the chitchat-dataset package'}")

    console.print(Rule("2  Masking: loss on the answers, and on nothing else"))
    masker = PromptMasker(tokenizer, max_length=settings.max_length, overflow="keep_turns")
    train, held_out = mask_both(rows, masker, settings)
    console.print(train.report)
    show_rows(train.dataset, tokenizer, console=console)

    console.print(Rule("3  Before training"))
    prompt, reference = first_exchange(tokenizer, held_out[0])
    stops = sorted(masker.stop_token_ids)
    with console.status("measuring the loss on held-out rows"):
        loss_before = held_out_loss(model, held_out)
        answer_before = greedy_answer(model, tokenizer, prompt, stops=stops)
    console.print(f"loss on {len(held_out)} held-out rows: {loss_before:.3f} nats per supervised token")

    console.print(Rule("4  Training with LoRA through TRL's SFTTrainer"))
    trained = fine_tune(model, tokenizer, train.dataset, settings, device=device, console=console)
    console.print(f"{settings.steps} steps, {trained.tokens} tokens in {trained.seconds:.0f} s")

    console.print(Rule("5  After training"))
    tuned = trained.trainer.model
    with console.status("measuring the loss on the same rows"):
        loss_after = held_out_loss(tuned, held_out)
        answer_after = greedy_answer(tuned, tokenizer, prompt, stops=stops)
    show_change(loss_before, loss_after, console=console)
    show_answers(tokenizer.decode(prompt), answer_before, answer_after, reference, console=console)

    console.print(Rule("6  The adapter"))
    with console.status("saving, and loading it again with PEFT"):
        loss_reloaded = save_and_reload(tuned, tokenizer, held_out, settings, device=device)
    console.print(f"saved to {settings.output}; loaded again with PEFT, held-out loss {loss_reloaded:.3f}")
    console.print(Text(f'    peft.AutoPeftModelForCausalLM.from_pretrained("{settings.output}")', style="bold"))
    console.print(f"whole demo: {time.perf_counter() - started:.0f} s")
    return Outcome(loss_before, loss_after, loss_reloaded, answer_before, answer_after)


def choose_device(name: str) -> str:
    """`"auto"` → a GPU if there is one, else the CPU.

    Raises:
        AssetError: `bad_device` for a device that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise AssetError(
            f"--device {name} cannot be used: {str(error).splitlines()[0]}",
            code="bad_device",
            remedy='use "cpu", or "auto" for a GPU if torch sees one.',
        ) from error
    return name


def make_folder(folder: Path) -> None:
    """Create `folder`, and make sure that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write in {folder}")
    except OSError as error:
        raise AssetError(
            f"--output {folder} cannot be written: {error}",
            code="bad_output",
            remedy="choose another folder with --output.",
        ) from error


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


def fine_tune(
    model: Any, tokenizer: Any, dataset: Any, settings: Settings, *, device: str, console: Console
) -> Trained:
    """LoRA on as many of the rows as the steps need."""
    from sft_plugins.cli.training import Recipe, train_lora

    recipe = Recipe(steps=settings.steps, rows_per_step=ROWS_PER_STEP, seed=settings.seed)
    rows = dataset.select(range(min(len(dataset), recipe.steps * recipe.rows_per_step)))
    return train_lora(
        model,
        tokenizer,
        rows,
        StrictPromptMaskingCollator(tokenizer),
        recipe=recipe,
        output=settings.output,
        device=device,
        console=console,
    )


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
