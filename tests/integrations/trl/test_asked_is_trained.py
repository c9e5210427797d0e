"""What is trained is what is asked: an overfitted model, asked as generation asks, gives the trained answers back and stops.

`python tests/integrations/trl/test_asked_is_trained.py --write` writes docs/reasoning-rows.md, the first batch per template.
"""

from __future__ import annotations

import html
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig

from sft_plugins.integrations.trl import sft_arguments
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, mask_dataset
from testkit.tiny_training import tiny_llama
from testkit.tokenizers import stop_ids_for_template, template_names, tokenizer_for_template

trl = pytest.importorskip("trl")

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reasoning-rows.md"
QUESTION, ANSWER, THOUGHT = "What is 6 * 7?", "It is 42.", "Six times seven."
REASONED = {
    "messages": [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT},
    ]
}
PLAIN = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How are you?"}]}
INLINE = {
    "messages": [
        {"role": "user", "content": "And 6 * 8?"},
        {"role": "assistant", "content": "<think>\nOne six more.\n</think>\n\n48."},
    ]
}
OFF = {"enable_thinking": False}
# Per template: its models, and each row with the switches under which generation is asked for it.
CASES: dict[str, tuple[str, list[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "deepseek_r1_distill": ("DeepSeek-R1-Distill", [(REASONED, {}), (INLINE, {})]),
    "nemotron_3_nano": ("Nemotron 3 Nano", [(REASONED, {}), (PLAIN, OFF)]),
    "glm4moe": ("GLM-4.5", [(REASONED, {}), (PLAIN, OFF)]),
    "qwen3": ("Qwen3", [(REASONED, {}), (PLAIN, OFF)]),
}


def trainer_for(name: str, tokenizer: Any, folder: Path) -> Any:
    """TRL's trainer with LoRA on a Llama of random weights, over the rows of `CASES[name]` in one batch."""
    rows, report = mask_dataset(
        Dataset.from_list([row for row, _ in CASES[name][1]]),
        PromptMasker(tokenizer, stop_token_ids=sorted(stop_ids_for_template(name))),
    )
    assert report.rows_out == len(CASES[name][1])
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=30, per_device_train_batch_size=len(rows), learning_rate=0.005,
        lr_scheduler_type="constant", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=30, **sft_arguments("masked"),
    )  # fmt: skip
    model = tiny_llama(tokenizer, hidden_size=128, num_attention_heads=4, initializer_range=0.2)
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=StrictPromptMaskingCollator(tokenizer),
        processing_class=tokenizer, peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_overfitted_model_gives_the_trained_answer_back_and_stops(name: str, tmp_path: Path) -> None:
    """M10: asked with `apply_chat_template(add_generation_prompt=True)`, as whoever uses the model does.."""
    if name not in template_names():
        pytest.skip(f"this TRL has no template {name}")
    tokenizer, stops = tokenizer_for_template(name), stop_ids_for_template(name)
    trainer = trainer_for(name, tokenizer, tmp_path)
    trainer.train()
    model = trainer.model.eval()
    for row, switches in CASES[name][1]:
        *asked, answer = row["messages"]
        prompt = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=False, **switches
        )
        made = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=120,
            eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        said = tokenizer.decode(made[:-1], skip_special_tokens=False)
        assert made[-1] in stops, said
        *_, spoken = said.rpartition("</think>")
        thought, _, text = answer["content"].rpartition("</think>")
        assert spoken.strip() == text.strip()
        if thoughts := answer.get("reasoning_content") or thought.removeprefix("<think>").strip():
            assert thoughts in said.partition("</think>")[0]
        else:
            assert said.strip() == answer["content"], "an answer without a thought, and nothing else"


def first_batch(name: str, tokenizer: Any, folder: Path) -> str:
    """The trainer's first batch decoded, a row a block; what carries loss in bold."""
    batch = next(iter(trainer_for(name, tokenizer, folder).get_train_dataloader()))
    blocks = []
    for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        text, trained = "", False
        width = int(real.sum())
        for start, end, carries in _runs(labels[:width].tolist()):
            piece = html.escape(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False), quote=False)
            text += f"<b>{piece}</b>" if carries else piece
            trained |= carries
        assert trained
        blocks.append(f"<pre>\n{text}\n</pre>")
    return "\n\n".join(sorted(blocks))


def _runs(labels: list[int]) -> list[tuple[int, int, bool]]:
    edges = [0, *(i for i in range(1, len(labels)) if (labels[i] == -100) != (labels[i - 1] == -100)), len(labels)]
    return [(a, b, labels[a] != -100) for a, b in itertools.pairwise(edges)]


def page() -> str:
    sections = [
        "# What is trained under reasoning templates",
        "",
        "The first batch of TRL's `SFTTrainer`, decoded: the prompt as generation is given it, **what carries loss in bold**. "
        "An overfitted model that is asked with `apply_chat_template(add_generation_prompt=True)` gives the bold text back and "
        "stops ([the test](../tests/integrations/trl/test_asked_is_trained.py)).",
        "",
        "A row without reasoning is asked with `enable_thinking=False`; no switch of DeepSeek-R1's closes the thought, so its "
        "rows have reasoning, under a key or in tags.",
        "",
        f"Templates of TRL {trl.__version__}. Written by `python tests/integrations/trl/test_asked_is_trained.py --write`.",
    ]
    for name, (models, _) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            sections += ["", f"## {models}", "", first_batch(name, tokenizer_for_template(name), Path(folder))]
    return "\n".join(sections) + "\n"


def test_the_page_shows_the_first_batches() -> None:
    if f"Templates of TRL {trl.__version__}." not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page shows the templates of another TRL")
    assert page() == PAGE.read_text(encoding="utf-8"), "run this file with --write"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    PAGE.write_text(page(), encoding="utf-8")
