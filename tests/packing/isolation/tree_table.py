"""Write `docs/tree-matrix.md`: `python tests/packing/isolation/tree_table.py`, some minutes on one core."""

from __future__ import annotations

import datetime
import platform
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from testkit.isolation_matrix import GRADIENTS, LOGITS, REFUSED  # noqa: E402
from testkit.tiny_models import architectures, not_examined  # noqa: E402
from testkit.tree_matrix import PAGE, Branched, examine_trees, table  # noqa: E402


def main() -> None:
    """Examine every architecture, new ones too, and write the page; what is not exact and not refused ends the run with 1."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # more only wait for each other at this size
    names, rows = sorted(architectures() + not_examined()), []
    for number, name in enumerate(names, start=1):
        print(f"\r{number}/{len(names)} {name:30}", end="", file=sys.stderr, flush=True)
        rows.append(examine_trees(name))
    print(file=sys.stderr)
    PAGE.write_text(page(rows), encoding="utf-8")
    if wrong := [row for row in rows if not row.exact and not row.refusal and not row.against]:
        sys.exit("\n".join(map(str, wrong)))


def page(rows: list[Branched]) -> str:
    """The document, from what was measured."""
    exact = [row for row in rows if row.exact]
    served = Counter(row.backend for row in exact)
    refused = [row for row in rows if row.against]
    unpacked = ", ".join(f"`{row.name}` ({REFUSED.get(row.name, (row.refusal,))[0]})" for row in rows if row.refusal)
    lines = [
        "# Matrix of prefix trees",
        "",
        f"Every architecture of the [isolation matrix](isolation-matrix.md) (transformers {transformers.__version__}) with a "
        "row of trees: seven segments, forks in a branch, near each other and in the last token, one of one token. fp32, CPU "
        f"(torch {torch.__version__}, Python {platform.python_version()}), {datetime.date.today().isoformat()}. Written by "
        "`python tests/packing/isolation/tree_table.py`; a handful of them is held by `tests/packing/isolation/test_trees.py`.",
        "",
        f"{len(exact)} of {len(rows)} are exact ({', '.join(f'{name} {count}' for name, count in served.most_common())}), "
        f"{len(refused)} are refused in trees and pack exactly without, and these pack in no way: {unpacked or 'none'}.",
        "",
        "- **logits**, **gradients**: largest difference between the branches of the row, under one plain next-token loss, "
        f"and each branch's row run alone, relative to the largest logit (allowed {LOGITS:.0e}) and to the parameter's largest "
        f"gradient (allowed {GRADIENTS:.0e}).",
        "- **siblings changed**: largest change in any branch when others that it does not see are replaced, relative to the "
        "largest logit; 0 is bit for bit.",
        "- **refused**: what the proof says; such a model trains rows without trees, and a row with them is an error.",
        "",
        *table(rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
