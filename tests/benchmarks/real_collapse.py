"""A real model under watch, healthy and collapsing: `python tests/benchmarks/real_collapse.py FOLDER`.

SmolLM2-135M-Instruct and all-MiniLM-L6-v2, both out of packages, LoRA through TRL's SFTTrainer, twice: on conversations
between people (`healthy`) and on the same conversations with one safe sentence for every answer (`same-answer`). Each
writes `FOLDER/<name>/collapse/report.html`; the tables printed at the end are those of `docs/collapse.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import transformers
from rich.console import Console

from sft_plugins.cli.demo.assets import Row, load_model, load_rows, split_held_out, to_dataset
from sft_plugins.cli.demo.training import Recipe, train_lora
from sft_plugins.cli.demo.watching import same_answer_rows
from sft_plugins.collapse import ModeCollapseCallback
from sft_plugins.collapse.history import read_history
from sft_plugins.collapse.probe.prompts import load_prompts
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, mask_dataset

STEPS, EVERY, OPEN, CLOSED, SAMPLES, NEW_TOKENS = 18, 6, 8, 2, 4, 20
FIGURES = ("diversity", "cross_similarity", "opening_share", "distinct_2", "entropy", "heldout_loss", "kl_base_now")


def watched(
    name: str, rows: list[Row], folder: Path, *, steps: int, every: int = EVERY, held_out_rows: list[Row] | None = None
) -> Path:
    """Train on `rows` under watch and save the adapter; the history's path. Held out are rows of theirs, or of others."""
    transformers.set_seed(0)
    model, tokenizer = load_model()
    masker = PromptMasker(tokenizer, max_length=160, overflow="keep_turns", errors="drop")
    train_at, held_at = split_held_out(rows[:400], 16)
    sides = [rows[i] for i in train_at], [(held_out_rows or rows)[i] for i in held_at]
    train, held_out = (mask_dataset(to_dataset(side), masker).dataset for side in sides)
    prompts = load_prompts(None)
    chosen = [p for tag, n in (("open", OPEN), ("closed", CLOSED)) for p in [q for q in prompts if q.tag == tag][:n]]
    watch = ModeCollapseCallback(
        tokenizer,
        [{"messages": list(p.messages), "tag": p.tag} for p in chosen],
        eval_pairs=held_out.to_list(),
        every_steps=every,
        samples_per_prompt=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        output_dir=folder / name / "collapse",
        budget=None,  # minutes of training cannot pay for samples out of 3 % of them
    )
    trained = train_lora(
        model,
        tokenizer,
        train,
        StrictPromptMaskingCollator(tokenizer),
        recipe=Recipe(steps=steps, rows_per_step=1),
        output=folder / name,
        device="cpu",
        console=Console(quiet=True),
        callbacks=[watch],
    )
    trained.trainer.save_model(str(folder / name))
    tokenizer.save_pretrained(str(folder / name))
    assert watch.history_path is not None
    return watch.history_path


def table(path: Path) -> None:
    """One row per look, as Markdown."""
    records = read_history(path)
    print(f"\n{path}\n\n| step | retained, 95 % | {' | '.join(FIGURES)} | level | findings |")
    print("| --- " * (len(FIGURES) + 4) + "|")
    for record in records:
        if record["kind"] not in ("baseline", "probe"):
            continue
        kept = record.get("intervals", {}).get("diversity_retained")
        verdict = record.get("verdict", {"level": "baseline", "findings": []})
        cells = [f"{record['values'][f]:.3f}" if f in record["values"] else "–" for f in FIGURES]
        interval = f"{kept[0]:.0%} ({kept[1]:.0%}–{kept[2]:.0%})" if kept else "–"
        codes = ", ".join(f"{f['code']} {f['level']}" for f in verdict["findings"]) or "–"
        print(f"| {record['step']} | {interval} | {' | '.join(cells)} | {verdict['level']} | {codes} |")
    print(records[-1].get("cost"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", choices=("healthy", "same-answer"))
    options = parser.parse_args()
    rows = load_rows()
    paths = [
        watched(name, made, options.folder, steps=options.steps)
        for name, made in (("same-answer", same_answer_rows(rows)), ("healthy", rows))
        if options.only in (None, name)
    ]
    for path in paths:
        table(path)


if __name__ == "__main__":
    main()
