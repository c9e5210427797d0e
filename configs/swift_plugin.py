"""ms-swift with rows of `sft-plugins mask --to swift`: they are checked before the first step, isolated where packed, and the
model is watched for collapse.

    sft-plugins mask conversations.jsonl --model ./model --output masked --to swift
    swift sft --model ./model --cached_dataset masked/rows --external_plugins configs/swift_plugin.py --callbacks sft_plugins
"""

from sft_plugins.integrations.swift import register

# The built-in prompts; watch={"prompts": "prompts.jsonl", "every_steps": 100} gives your own, watch=False watches nothing.
register(watch=True)
