"""Tokenizers, configurations and models, from a folder or the hub; what cannot be had is an `AssetError` that says why."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sft_plugins.errors import AssetError
from sft_plugins.preflight.data.files import home

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, a folder or a hub id.

    Raises:
        AssetError: `missing_file`, `model_unreachable`, or `bad_model` for a folder without a
            tokenizer or with one that cannot be read.
    """
    from transformers import AutoTokenizer

    where = locate(source)
    folder = Path(where)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise AssetError(
            f"{where} has no tokenizer: none of {', '.join(TOKENIZER_FILES[:3])} is there.",
            code="bad_model",
            remedy="save it beside the model (`tokenizer.save_pretrained(folder)`), or point --model to a folder or hub "
            "id that has one; an adapter's base model, for example.",
        )
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, where, "a tokenizer")
    return tokenizer


def load_config(source: str) -> PretrainedConfig:
    """The configuration of the model `source`; arguments and errors as for `load_tokenizer`."""
    from transformers import AutoConfig

    config: PretrainedConfig = _load(AutoConfig, locate(source), "a model's configuration")
    return config


def load_model(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, on the CPU in float32; arguments and errors as for `load_tokenizer`."""
    import torch

    return load_weights(source, dtype=torch.float32), load_tokenizer(source)


def load_weights(source: str, **options: Any) -> PreTrainedModel:
    """A causal language model on the CPU, with `options` of `from_pretrained`; errors as for `load_tokenizer`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where, what = locate(source), "a causal language model"
    _load(AutoConfig, where, what)  # the loader of weights asks an unreachable hub again and again, this one does not
    model: PreTrainedModel = _load(AutoModelForCausalLM, where, what, **options)
    return model


def locate(source: str) -> str:
    """The folder or hub id meant by `source`; `~` is the home of a user.

    Raises:
        AssetError: `missing_file` for a path where no folder is.
    """
    place = home(source)
    if not place.is_dir() and _looks_like_a_path(source):
        raise AssetError(
            f"--model {source}: there is no such folder.",
            code="missing_file",
            remedy="give a folder that holds config.json and the tokenizer's files, or a hub id such as owner/name.",
        )
    return str(place) if source.startswith("~") else source


def _unusable(where: str, what: str, error: Exception) -> AssetError:
    """The error for a folder or hub id that did not give `what`."""
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if Path(where).is_dir():
        return AssetError(
            f"{where} does not hold {what} that can be loaded: {reason}",
            code="bad_model",
            remedy="point --model to a folder written by save_pretrained (config.json, weights, tokenizer files).",
        )
    return AssetError(
        f"--model {where}: neither a folder here nor a model the hub could give: {reason}",
        code="model_unreachable",
        remedy="check the id and the network (HF_HUB_OFFLINE=0 allows the hub), or download the model and give its folder.",
    )


def _load(factory: Any, where: str, what: str, **options: Any) -> Any:
    try:
        # False, not None: None asks on the terminal whether to run the repository's code.
        offline = not Path(where).is_dir() and not _hub_has_an_address()
        return factory.from_pretrained(where, trust_remote_code=False, local_files_only=offline, **options)
    except (
        Exception
    ) as error:  # OSError, ValueError, KeyError, ImportError, and Rust's plain Exception: all are the input's
        raise _unusable(where, what, error) from error


def _hub_has_an_address() -> bool:
    """Whether the hub's name resolves, or a proxy is asked instead. Without an address the hub's client tries for a minute."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except (OSError, UnicodeError):
        return False
    return True


def _looks_like_a_path(source: str) -> bool:
    """A hub id is `name` or `owner/name`; everything else can only be meant as a path."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
