"""A tokenizer as Axolotl changes it before it masks: `added_tokens_overrides`, `special_tokens`, `tokens`, the template.

special_tokens: {eos_token: <|im_end|>}   →  EOS of the tokenizer, a token of its own from then on
tokens: [<|im_start|>]                    →  one token where there were several
eot_tokens: [<|eot_id|>]                  →  ids that end an answer beside EOS
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_plugins.errors import AssetError
from sft_plugins.integrations.axolotl.settings import stop_token_ids
from sft_plugins.preflight import load_tokenizer, scratch_folder

_EMBEDDINGS = {"gpt_neox": ("embed_in", "embed_out"), "falcon": ("word_embeddings", "lm_head")}
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens")


def prepare(tokenizer: Any, data: Mapping[str, Any], path: str, template: str | None) -> tuple[Any, list[int] | None]:
    """The tokenizer that Axolotl masks with, and the ids that end answers (None: the tokenizer's own).

    Args:
        template: of the whole run, None where the tokenizer keeps its own.

    Raises:
        AssetError: `bad_config` for tokens that Axolotl would refuse.
    """
    if overrides := data.get("added_tokens_overrides"):
        tokenizer = _renamed(tokenizer, overrides, path)
    if type(tokenizer).__name__ in _LLAMA and not tokenizer.pad_token:
        tokenizer.pad_token = "</s>"
    _add_tokens(tokenizer, data, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer, _stops(tokenizer, data, path)


_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")


def _add_tokens(tokenizer: Any, data: Mapping[str, Any], path: str) -> None:
    from transformers import AddedToken

    special = data.get("special_tokens") or {}
    tokens = data.get("tokens") or []
    if not isinstance(special, Mapping) or set(special) - set(_NAMES):
        raise _refused(path, f"`special_tokens: {special}`", f"names of tokens are {', '.join(_NAMES)}.")
    named = {name: token for name, token in special.items() if token is not None and name != _NAMES[-1]}
    additional = special.get(_NAMES[-1]) or []
    for token in (*named.values(), *tokens, *additional):
        if not isinstance(token, str) or not token:
            raise _refused(path, f"token {token!r}", "write it as text, in quotes where YAML reads it otherwise.")
    for name, token in named.items():
        _refuse_untrained(tokenizer, name, token, data, path)
        tokenizer.add_special_tokens({name: AddedToken(token, rstrip=False, lstrip=False, normalized=False)})
    tokenizer.add_tokens([AddedToken(token, rstrip=False, lstrip=False, normalized=False) for token in tokens])
    if additional:
        tokenizer.add_special_tokens({"additional_special_tokens": list(additional)})


def _refuse_untrained(tokenizer: Any, name: str, token: str, data: Mapping[str, Any], path: str) -> None:
    """Axolotl's rule: an adapter does not train the embedding of a new special token unless it is told to."""
    if not data.get("adapter") or name == "pad_token" or getattr(tokenizer, name, None) == token:
        return
    wanted = _EMBEDDINGS.get(str(data.get("model_type_of_config") or ""), ("embed_tokens", "lm_head"))
    saved = data.get("lora_modules_to_save") or ()
    if len(tokenizer.encode(token, add_special_tokens=False)) > 2 and not set(wanted) <= set(saved):
        raise _refused(
            path,
            f"`special_tokens.{name}: {token}` is new to the tokenizer, and the adapter does not train its embedding",
            f"set `lora_modules_to_save: [{', '.join(wanted)}]`: Axolotl stops without it.",
        )


def _stops(tokenizer: Any, data: Mapping[str, Any], path: str) -> list[int] | None:
    tokens = data.get("eot_tokens") or ()
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise _refused(path, f"`eot_tokens: {tokens}`", "write a list of tokens.")
    for token in tokens:
        if len(tokenizer.encode(str(token), add_special_tokens=False)) != 1:
            raise _refused(
                path, f"`eot_tokens`: {token!r} is no single token of the tokenizer", "list it under `tokens:` too."
            )
    return stop_token_ids(tokenizer, tokens)


def _renamed(tokenizer: Any, names: Mapping[Any, str], path: str) -> Any:
    """The tokenizer with added tokens renamed by id, through the files that it would be saved in."""
    folder = scratch_folder()
    tokenizer.save_pretrained(folder)
    by_id = {int(token): str(name) for token, name in names.items()}
    for file, change in (("tokenizer_config.json", _rename_in_config), ("tokenizer.json", _rename_in_tokenizer)):
        place = Path(folder) / file
        if place.is_file():
            content = json.loads(place.read_text(encoding="utf-8"))
            missing = change(content, by_id)
            if missing:
                raise _refused(
                    path,
                    f"`added_tokens_overrides`: {', '.join(map(str, missing))} is no id of an added token",
                    f"choose among {', '.join(map(str, sorted(tokenizer.added_tokens_decoder)[:12]))}.",
                )
            place.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return load_tokenizer(str(folder))


def _rename_in_config(content: dict[str, Any], names: dict[int, str]) -> list[int]:
    decoder = content.get("added_tokens_decoder")
    if decoder is None:
        return []
    missing = [token for token in names if str(token) not in decoder]
    for token, name in names.items():
        if str(token) in decoder:
            decoder[str(token)]["content"] = name
    return missing


def _rename_in_tokenizer(content: dict[str, Any], names: dict[int, str]) -> list[int]:
    added = {entry["id"]: entry for entry in content.get("added_tokens", ())}
    for token, name in names.items():
        if token in added:
            added[token]["content"] = name
    vocabulary = content.get("model", {}).get("vocab")
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = {names.get(token, text): token for text, token in vocabulary.items()}
    return [token for token in names if token not in added]


def _refused(path: str, what: str, remedy: str) -> AssetError:
    return AssetError(f"{path}: {what}.", code="bad_config", remedy=remedy)
