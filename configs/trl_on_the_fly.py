"""LoRA with TRL on raw rows: the collator masks each batch as it is drawn, so nothing is prepared beforehand.

    python configs/trl_on_the_fly.py --data conversations.jsonl

One JSON object per line: `messages`, `prompt` and `response`, Alpaca or ShareGPT rows. A row that cannot be masked exactly
stops training when its batch is drawn; `trl_masking.py` finds all such rows before the first step.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sft_plugins.integrations.trl import sft_arguments
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
parser.add_argument("--data", required=True, help="a JSON Lines file")
parser.add_argument("--output", default="runs/trl_on_the_fly")
parser.add_argument("--steps", type=int, default=-1, help="optimizer steps; -1 for one epoch")
parser.add_argument("--max-length", type=int, default=2048)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")

masker = PromptMasker(tokenizer, max_length=args.max_length, overflow="keep_turns")
rows = load_dataset("json", data_files=args.data, split="train")

gpu = torch.cuda.is_available()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.output,
        max_steps=args.steps,
        num_train_epochs=1,
        **sft_arguments("raw"),  # raw columns reach the collator
        bf16=gpu,
        use_cpu=not gpu,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=rows,
    data_collator=StrictPromptMaskingCollator(tokenizer, masker=masker),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(args.output)
print(f"adapter saved to {args.output}")
