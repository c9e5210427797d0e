"""`sft-plugins demo`: the whole walk on a small real model, with what it needs and nothing else does."""

from sft_plugins.cli.demo.command import register as register
