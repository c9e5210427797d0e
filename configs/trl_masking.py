"""LoRA with TRL, loss on exactly the answers: mask the data set first, then train on it.

    python configs/trl_masking.py --data conversations.jsonl

One JSON object per line: `messages`, `prompt` and `response`, Alpaca or ShareGPT rows.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sft_plugins.integrations.trl import sft_arguments
from sft_plugins.masking import PromptMasker, StrictPromptMaskingCollator, mask_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
parser.add_argument("--data", required=True, help="a JSON Lines file")
parser.add_argument("--output", default="runs/trl_masking")
parser.add_argument("--steps", type=int, default=-1, help="optimizer steps; -1 for one epoch")
parser.add_argument("--max-length", type=int, default=2048)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")

masker = PromptMasker(tokenizer, max_length=args.max_length, overflow="keep_turns")
rows, report = mask_dataset(load_dataset("json", data_files=args.data, split="train"), masker)
print(report)

gpu = torch.cuda.is_available()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.output,
        max_steps=args.steps,
        num_train_epochs=1,
        **sft_arguments("masked"),  # TRL leaves these rows alone: it neither cuts nor re-labels them
        bf16=gpu,
        use_cpu=not gpu,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=rows,
    data_collator=StrictPromptMaskingCollator(tokenizer),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(args.output)
print(f"adapter saved to {args.output}")
