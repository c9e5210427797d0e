"""ms-swift: rows of `sft-plugins mask --to swift`, checked before the first step, isolated where packed, and watched.

A file for `--external_plugins` holds two lines:

    from sft_plugins.integrations.swift import register
    register()                        # register(watch=True), or register(watch={"prompts": "prompts.jsonl"})

and the command `--callbacks sft_plugins`. ms-swift 4.6 reads the rows of `--cached_dataset` as conversations, which its
template tokenises as they are drawn; `rows.py` hands on what is tokenised already.
"""

from sft_plugins.integrations.swift.callback import register

__all__ = ["register"]
