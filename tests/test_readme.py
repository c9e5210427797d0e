"""Every Python block of the README and of the pages in `docs/` runs, page by page in one namespace, on a tiny model."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

import sft_plugins.collapse
from sft_plugins import PromptMasker, mask_dataset
from testkit.tiny_training import tiny_llama
from testkit.tokenizers import build_tokenizer

trl = pytest.importorskip("trl")
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "docs/masking.md", "docs/packing.md", "docs/collapse.md"]
LINKING = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the blocks leave to the reader (model, tokenizer, dataset) is given here; a run is cut to two steps on a CPU."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    short = functools.partial(
        trl.SFTConfig, max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1
    )
    monkeypatch.setattr(trl, "SFTConfig", short)
    brief = functools.partial(sft_plugins.collapse.ModeCollapseCallback, max_new_tokens=8)
    monkeypatch.setattr(sft_plugins.collapse, "ModeCollapseCallback", brief)
    tokenizer = build_tokenizer("qwen")
    tiny_llama(tokenizer, max_position_embeddings=512).save_pretrained("base")  # a run says what it started from
    names: dict[str, Any] = {
        "tokenizer": tokenizer,
        "model": AutoModelForCausalLM.from_pretrained("base"),
        "dataset": Dataset.from_list(
            [
                {
                    "messages": [
                        {"role": "user", "content": f"What is {n}?"},
                        {"role": "assistant", "content": "A number."},
                    ]
                }
                for n in range(12)
            ]
        ),
    }
    masked = mask_dataset(names["dataset"], PromptMasker(tokenizer)).dataset
    names |= {"rows": masked, "held_out_rows": masked.to_list()[:2], "prompts": ["Say hi.", "Tell a story."]}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if "trainer" in names:
        names["trainer"].train()
        assert any("loss" in entry for entry in names["trainer"].state.log_history)


@pytest.mark.parametrize("page", LINKING)
def test_every_file_a_page_links_to_is_there(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^()#\s]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links or page != "README.md"
    assert [link for link in links if not os.path.exists(ROOT / Path(page).parent / link)] == []


def test_every_make_target_the_readme_names_exists() -> None:
    targets = set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)", README, flags=re.M))
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", rules, flags=re.M)] == []
