"""A tokenizer of its family for each chat template of TRL."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from testkit.tokenizers.kinds import build_tokenizer

# prefix of the template's name -> kind, bos, eos, the ends of turn that the generation config lists besides eos, as
# the checkpoints have them. The longest matching prefix counts.
_TEMPLATES: dict[str, tuple[str, str | None, str, tuple[str, ...]]] = {
    "cohere": ("bytelevel", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ()),
    "deepseek": ("bytelevel", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ()),
    "diffusion_gemma": ("sp-nodummy", "<bos>", "<eos>", ("<turn|>", "<|tool_response>")),
    "gemma": ("sp-nodummy", "<bos>", "<eos>", ("<end_of_turn>",)),
    "gemma4": ("sp-nodummy", "<bos>", "<eos>", ("<turn|>", "<|tool_response>")),
    "glm4moe": ("qwen", None, "<|endoftext|>", ("<|user|>", "<|observation|>")),
    "gptoss": ("llama3", "<|startoftext|>", "<|return|>", ("<|call|>", "<|endoftext|>")),
    "idefics3": ("llama3", "<|begin_of_text|>", "<|end_of_text|>", ("<end_of_utterance>",)),
    "lfm2": ("llama3", "<|startoftext|>", "<|im_end|>", ()),
    "llama3": ("llama3", "<|begin_of_text|>", "<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>")),
    "llava_next": ("sp-bpe", "<s>", "</s>", ()),
    "muse_glimmer": ("llama3", "<|begin_of_text|>", "<|eot|>", ("<|eom|>",)),
    "nemotron": ("qwen", "<s>", "<|im_end|>", ()),
    "phi3": ("sp-bpe", "<s>", "<|endoftext|>", ("<|end|>",)),
    "qwen": ("qwen", None, "<|im_end|>", ("<|endoftext|>",)),
    "smolvlm": ("bytelevel", "<|im_start|>", "<end_of_utterance>", ()),
}


_SPECIAL = re.compile(
    r"<\|[A-Za-z_\"]{1,40}\|?>|<[a-z_]{1,40}\|>|<｜[^｜\n]{1,40}｜>|<(?:start|end)_of_[a-z]+>|<image>|\[gMASK\]|<sop>"
)


# Tokens of their own, but ordinary text to `skip_special_tokens`, as in the Qwen, GLM and Nemotron checkpoints.
_ADDED = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")


def template_dir() -> Path:
    """TRL's folder of chat templates, found without importing TRL."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the template matrix needs trl, which is not installed: pip install 'sft-plugins[trl]'")
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def template_names() -> list[str]:
    """TRL's templates that have their row on the page."""
    return sorted(_installed_templates() & _templates_of_the_page())


def new_templates() -> list[str]:
    """Those that a newer TRL brought since: `python tests/masking/test_template_matrix.py --write …` examines them."""
    return sorted(_installed_templates() - _templates_of_the_page())


def _installed_templates() -> set[str]:
    return {path.stem for path in template_dir().glob("*.jinja")}


@functools.cache
def _templates_of_the_page() -> frozenset[str]:
    page = Path(__file__).parents[4] / "docs" / "template-matrix.md"
    table = page.read_text(encoding="utf-8").partition("\n## ")[0]
    return frozenset(re.findall(r"^\| (\w+) \| \d", table, flags=re.M))


def template_text(name: str) -> str:
    path = template_dir() / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"the installed TRL has no template {name}")
    return path.read_text(encoding="utf-8")


def template_facts(name: str) -> tuple[str, str | None, str, tuple[str, ...]]:
    """(kind, bos, eos, further ends of turn) of the checkpoints that carry this template."""
    prefixes = [prefix for prefix in _TEMPLATES if name.startswith(prefix)]
    if not prefixes:
        raise KeyError(
            f"no hand-written facts for chat template {name!r}: add it to testkit.tokenizers.fitted._TEMPLATES"
        )
    return _TEMPLATES[max(prefixes, key=len)]


@functools.cache
def _tokenizer_for_template(name: str) -> Any:
    kind, bos, eos, ends = template_facts(name)
    text = template_text(name)
    special = [*ends, *sorted(set(_SPECIAL.findall(text)))]
    added = sorted(set(_ADDED.findall(text)))
    pad = "<|pad|>"
    return build_tokenizer(
        kind, chat_template=text, special_tokens=special, added_tokens=added, bos=bos, eos=eos, pad=pad,
        add_bos=bos is not None and kind in ("llama3", "sp-bpe", "sp-nodummy"), add_eos=False,
    )  # fmt: skip


def tokenizer_for_template(name: str) -> Any:
    """A fresh tokenizer for TRL's template `name`, EOS and generation config as in the checkpoints that ship it."""
    tokenizer = copy.deepcopy(_tokenizer_for_template(name))
    tokenizer.name_or_path = _checkpoint(name)
    return tokenizer


@functools.cache
def _checkpoint(name: str) -> str:
    """A folder with the generation config of the checkpoints that carry template `name`."""
    folder = tempfile.mkdtemp(prefix="testkit-")
    GenerationConfig(eos_token_id=sorted(stop_ids_for_template(name))).save_pretrained(folder)
    return folder


def stop_ids_for_template(name: str) -> set[int]:
    """Ids that end generation: EOS and the ends of turn of the generation config."""
    tokenizer = _tokenizer_for_template(name)
    _, _, eos, ends = template_facts(name)
    return {tokenizer.convert_tokens_to_ids(token) for token in (eos, *ends)}


def special_for(name: str) -> str:
    """The special token that ends a turn of template `name`."""
    _, _, eos, ends = template_facts(name)
    return ends[0] if ends else eos


def has_generation_markers(name: str) -> bool:
    return bool(re.search(r"{%-?\s*generation\s*-?%}", template_text(name)))


def dump(tokenizer: Any) -> str:
    """Everything observable of a tokenizer, to show that nobody changed it."""
    state: dict[str, Any] = {
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "chat_template": tokenizer.chat_template,
        "length": len(tokenizer),
        "model_max_length": tokenizer.model_max_length,
        "added": sorted((index, str(token)) for index, token in tokenizer.added_tokens_decoder.items()),
    }
    if tokenizer.is_fast:
        state["backend"] = tokenizer.backend_tokenizer.to_str()
    return json.dumps(state, sort_keys=True)
