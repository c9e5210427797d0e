"""What `soften` finds on a real model that has collapsed: `python tests/benchmarks/real_soften.py FOLDER`.

Two runs of `real_collapse.py`'s kind: every answer of the data one safe sentence (`same-answer`), and every second one, with
held-out answers of people (`half-refusals`). Each is softened at four shares; the tables are those of `docs/collapse.md`,
the pages `FOLDER/<name>/soften.html`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from real_collapse import table, watched

from sft_plugins.cli.demo.assets import load_rows
from sft_plugins.cli.demo.watching import same_answer_rows
from sft_plugins.collapse import SOFTENING_COLUMNS, soften, softening_page, softening_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=("same-answer", "half-refusals"))
    options = parser.parse_args()
    rows = load_rows()
    safe = same_answer_rows(rows)
    data = {
        "same-answer": (safe, None),
        "half-refusals": ([s if i % 2 else r for i, (r, s) in enumerate(zip(rows, safe, strict=True))], rows),
    }
    for name, (made, held_out) in data.items():
        if options.only not in (None, name):
            continue
        table(watched(name, made, options.folder, steps=options.steps, every=options.steps, held_out_rows=held_out))
        found = soften(options.folder / name, advance=print)
        (options.folder / name / "soften.html").write_text(softening_page(found), encoding="utf-8")
        print(f"\n| {' | '.join(SOFTENING_COLUMNS)} |\n" + "| --- " * len(SOFTENING_COLUMNS) + "|")
        print("\n".join(f"| {' | '.join(row)} |" for row in softening_rows(found.tradeoff)))
        print(found.tradeoff.outcome, found.tradeoff.recommended, found.tradeoff.reason, found.check, found.notes)


if __name__ == "__main__":
    main()
