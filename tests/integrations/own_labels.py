"""Each trainer's own labels beside ours on the hand-written conversations of the tests: how many rows differ, and in what.

    SFT_PLUGINS_LLAMAFACTORY=.venv-llamafactory/bin/python SFT_PLUGINS_SWIFT=.venv-swift/bin/python \
      .venv/bin/python tests/integrations/own_labels.py --write docs/other-trainers.md

Run by hand after `make test-swift` and `make test-llamafactory`, which make the two environments.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from sft_plugins.masking import PromptMasker  # noqa: E402
from testkit.conversations import CONVERSATIONS  # noqa: E402
from testkit.tiny_training import tiny_llama  # noqa: E402
from testkit.tokenizers import tokenizer_for_template  # noqa: E402

HERE = Path(__file__).parent
# Our template of TRL's → (LLaMA-Factory's template, ms-swift's model type, its template)
TEMPLATES = {
    "qwen2_5": ("qwen", "qwen2", "qwen2_5"),
    "qwen3": ("qwen3", "qwen3", "qwen3"),
    "llama3": ("llama3", "llama", "llama3"),
    "llama3_2": ("llama3", "llama", "llama3_2"),
    "gptoss": ("gpt_oss", "gpt_oss", "gpt_oss"),
}
# Trainer → where its Python is named, what drives it there, and the form of data that it is told of.
DRIVERS = {
    "LLaMA-Factory, `sharegpt`": (
        "SFT_PLUGINS_LLAMAFACTORY",
        HERE / "llamafactory" / "drive_llamafactory.py",
        "sharegpt",
    ),
    "LLaMA-Factory, `openai`": ("SFT_PLUGINS_LLAMAFACTORY", HERE / "llamafactory" / "drive_llamafactory.py", "openai"),
    "ms-swift": ("SFT_PLUGINS_SWIFT", HERE / "swift" / "label_rows.py", ""),
}
KINDS = ("same", "prompt", "answer", "labels", "split", "refused")
MARK = "<!-- own_labels.py -->"


def rows_of(template: str) -> list[dict[str, Any]]:
    special = tokenizer_for_template(template).eos_token
    return [one.for_tokenizer(special) for one in CONVERSATIONS if not getattr(one, "options", None)]


def theirs(host: str, folders: dict[str, Path], scratch: Path) -> dict[str, list[Any]]:
    """By template, what the host makes of each conversation."""
    variable, driver, formatting = DRIVERS[host]
    jobs = []
    for name, (factory, kind, swift) in TEMPLATES.items():
        words = {"template": factory, "formatting": formatting} if formatting else {"type": kind, "template": swift}
        jobs.append({"name": name, "model": str(folders[name]), "rows": rows_of(name), **words})
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ[variable], str(driver), "jobs.json", "seen.json"]
    subprocess.run(command, cwd=scratch, env={**environment, "HF_HUB_OFFLINE": "1"}, check=True, capture_output=True)
    seen = json.loads((scratch / "seen.json").read_text())
    return {name: made["rows"] if isinstance(made, dict) else made for name, made in seen.items()}


def kind_of(made: Any, ours: list[tuple[list[int], list[int]]]) -> str:
    """How the host's row compares with ours.

    same     ids and labels are ours             prompt   tokens before the first trained one of ours differ
    labels   the ids are ours, the loss is not   answer   that prompt is ours, and what follows is not
    split    ours are several rows, since the template rewrites history; refused   the host makes no row
    """
    if not isinstance(made, list):
        return "refused"
    ids, labels = made
    if (ids, labels) in ours and len(ours) == 1:
        return "same"
    if len(ours) > 1:
        return "split"
    wanted, trained = ours[0]
    if ids == wanted:
        return "labels"
    begin = next(i for i, label in enumerate(trained) if label != -100)
    return "prompt" if ids[:begin] != wanted[:begin] else "answer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--examples", action="store_true", help="print the first row of each kind, as text")
    asked = parser.parse_args()
    columns = [
        "trainer",
        "template",
        "same",
        "other prompt",
        "other answer",
        "other labels",
        "one row for several",
        "no row",
    ]
    columns.append("trains what we refuse")
    lines = [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        folders, ours = {}, {}
        for name in TEMPLATES:
            tokenizer = tokenizer_for_template(name)
            ours[name] = [
                [(row.input_ids, row.labels) for row in outcome.rows] if not outcome.errors else []
                for outcome in PromptMasker(tokenizer, errors="drop").encode_batch(rows_of(name))
            ]
            folders[name] = scratch / name
            tiny_llama(tokenizer).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        for host in DRIVERS:
            for name, made in theirs(host, folders, scratch).items():
                counts: Counter[str] = Counter()
                for row, own in zip(made, ours[name], strict=True):
                    kind = kind_of(row, own) if own else "extra" if isinstance(row, list) else "neither"
                    counts[kind] += 1
                    if asked.examples and counts[kind] == 1 and kind in KINDS[1:4]:
                        tokenizer = tokenizer_for_template(name)
                        print(
                            f"--- {host}, {name}, {kind}\n{shown(tokenizer, *row)}\n--- ours\n{shown(tokenizer, *own[0])}\n"
                        )
                cells = " | ".join(str(counts[kind]) for kind in KINDS)
                lines.append(f"| {host} | {name} | {cells} | {counts['extra']} |")
    print("\n".join(lines))
    if asked.write:
        text = asked.write.read_text(encoding="utf-8")
        before, _, rest = text.partition(MARK)
        _, _, after = rest.partition(MARK)
        today = datetime.date.today()
        said = f"{len(rows_of('qwen3'))} conversations, {today.day} {today:%B %Y}:"
        asked.write.write_text(
            f"{before}{MARK}\n{said}\n\n" + "\n".join(lines) + f"\n\n{MARK}{after}", encoding="utf-8"
        )


def shown(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    """The row as text, what is trained in [[brackets]]."""
    text = ""
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        trained, was = label != -100, i > 0 and labels[i - 1] != -100
        text += "[[" * (trained and not was) + "]]" * (was and not trained) + repr(tokenizer.decode([token]))[1:-1]
    return text + "]]" * (labels[-1] != -100)


if __name__ == "__main__":
    main()
