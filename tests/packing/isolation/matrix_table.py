"""Write `docs/isolation-matrix.md`: `python tests/packing/isolation/matrix_table.py`, about two minutes on one core."""

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

from testkit.isolation_matrix import GRADIENTS, LENGTHS, LOGITS, Examined, examine, table  # noqa: E402
from testkit.tiny_models import CANNOT_BUILD, PAGE, architectures, not_examined  # noqa: E402


def main() -> None:
    """Examine every architecture, new ones too, and write the page."""
    transformers.utils.logging.set_verbosity_error()
    names, rows, failed = sorted(architectures() + not_examined()), [], {}
    for number, name in enumerate(names, start=1):
        print(f"\r{number}/{len(names)} {name:30}", end="", file=sys.stderr, flush=True)
        try:
            rows.append(examine(name))
        except (
            Exception
        ) as error:  # a new one that cannot be built by any rule here is a line of the page, no end of the run
            if name not in not_examined():
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(file=sys.stderr)
    PAGE.write_text(page(rows, failed), encoding="utf-8")


def page(rows: list[Examined], failed: dict[str, str]) -> str:
    """The document, from what was measured, and what could not be."""
    today = Counter(row.today.split()[0] for row in rows)
    cached = Counter(row.today_with_cache.split()[0] for row in rows)
    served = Counter(row.backend or "refused" for row in rows)
    lines = [
        "# Isolation matrix",
        "",
        f"Every architecture of the causal-LM mapping of transformers {transformers.__version__} that can be built tiny "
        f"from its configuration: {len(rows)} of {len(rows) + len(CANNOT_BUILD) + len(failed)}. Documents of "
        f"{', '.join(map(str, LENGTHS))} tokens in one row, fp32, CPU (torch {torch.__version__}, Python "
        f"{platform.python_version()}), {datetime.date.today().isoformat()}. Written by "
        "`python tests/packing/isolation/matrix_table.py`; held by `tests/packing/isolation/test_matrix.py`.",
        "",
        "- **today**: the model as transformers builds it, given the packed row with every boundary key (`position_ids`, "
        "`cu_seq_lens_q/k`, `max_length_q/k`, `seq_idx`) and `use_cache=False`, on its default attention: "
        f"{today['exact']} exact, {today['leaks']} leak, {today['raises']} raise.",
        "- **today, cache on**: the same call with the model's default config, which makes a cache: "
        f"{cached['exact']} exact, {cached['leaks']} leak, {cached['raises']} raise.",
        f"- **backend**: what `isolate(model)` chose: {', '.join(f'{k} {v}' for k, v in served.most_common())}. "
        "(`native` needs kernels that a CPU does not have.)",
        "- **logits**, **gradients**: largest difference between packed documents and each document run alone, relative to "
        f"the largest logit (allowed {LOGITS:.0e}) and to the parameter's largest gradient (allowed {GRADIENTS:.0e}).",
        "- **others changed**: largest change in any other document when one is replaced, relative to the largest logit; "
        "0 is bit for bit.",
        "- **why not faster**: what the probe, or the attention function, said of the backends tried before.",
        "",
        "With isolation off and boundaries withheld, as a naive packer would have it, every one of them fails the same "
        f"comparison (smallest difference in the logits: {min(row.plain.logits for row in rows):.0e}).",
        "",
        *table(rows),
        "",
        "## Not built",
        "",
        *(f"- `{name}`: {why}" for name, why in CANNOT_BUILD.items()),
        *(f"- `{name}`: not examined, new in this transformers ({why})" for name, why in failed.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
