"""What each trainer reads from disk, and the lines that point it there. Versions: docs/other-trainers.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_plugins._options import one_of
from sft_plugins.errors import AssetError

PACKED = ("input_ids", "labels", "seq_lengths")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a trainer wants its rows.

    Attributes:
        host: its name.
        columns: of a row that is one document.
        packed: of a row of several, None where the trainer cannot read those as what they are. Never an attention mask: its
            presence would switch off what keeps documents apart.
        form: of the files.
        file: where the lines of configuration are written.
        lines: `(rows, model, packed)` → those lines.
    """

    host: str
    columns: tuple[str, ...] = ("input_ids", "attention_mask", "labels")
    packed: tuple[str, ...] | None = None
    form: Literal["arrow", "parquet"] = "arrow"
    file: str
    lines: Callable[[Path, str, bool], str]


def _trl(rows: Path, model: str, packed: bool) -> str:
    collator = (
        "BlockDiagonalPackingCollator(tokenizer, model=model)" if packed else "StrictPromptMaskingCollator(tokenizer)"
    )
    return f"""\
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sft_plugins import {collator.partition("(")[0]}
from sft_plugins.integrations.trl import check_trainer, sft_arguments

tokenizer, model = AutoTokenizer.from_pretrained({model!r}), AutoModelForCausalLM.from_pretrained({model!r})
rows = load_from_disk({str(rows)!r})
arguments = SFTConfig(output_dir="out", **sft_arguments("{"packed" if packed else "masked"}"))
trainer = SFTTrainer(model, args=arguments, train_dataset=rows, data_collator={collator})
check_trainer(trainer, dataset=rows)
trainer.train()
"""


def _llamafactory(rows: Path, model: str, packed: bool) -> str:  # noqa: ARG001 (packed rows are refused)
    return f"""\
# Beside the lines that every run has (configs/llamafactory_lora.yaml has them all).
model_name_or_path: {_yaml(model)}
tokenized_path: {_yaml(str(rows))}
dataset: unused             # must be named, and is not read: tokenized_path stands in its place
"""


def _swift(rows: Path, model: str, packed: bool) -> str:
    return f"""\
# plugin.py: see configs/swift_plugin.py
swift sft --model {_shell(model)} --cached_dataset {_shell(str(rows))} \\
  --external_plugins plugin.py --callbacks sft_plugins{" --per_device_train_batch_size 1" if packed else ""}
"""


def _unsloth(rows: Path, model: str, packed: bool) -> str:  # noqa: ARG001
    return f"""\
from unsloth import FastLanguageModel
from datasets import load_from_disk
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained({model!r})
model = FastLanguageModel.get_peft_model(model)
rows = load_from_disk({str(rows)!r})
# No data_collator: any collator would switch Unsloth's padding-free path off.
arguments = SFTConfig(output_dir="out", max_length=None)
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=arguments)
trainer.train()
"""


def _verl(rows: Path, model: str, packed: bool) -> str:  # noqa: ARG001
    return f"""\
# verl_rows.py: see configs/verl_rows.py
torchrun --standalone --nproc_per_node=1 -m verl.trainer.sft_trainer model.path={_shell(model)} \\
  data.train_files={_shell(str(rows))} data.pad_mode=no_padding \\
  data.custom_cls.path=verl_rows.py data.custom_cls.name=MaskedRows
"""


def _parquet(rows: Path, model: str, packed: bool) -> str:  # noqa: ARG001
    return f"""\
from datasets import load_dataset

rows = load_dataset("parquet", data_files={str(rows / "*.parquet")!r}, split="train")
"""


LAYOUTS = {
    "trl": Layout(host="TRL", columns=("input_ids", "labels"), packed=PACKED, file="use.py", lines=_trl),
    "llamafactory": Layout(host="LLaMA-Factory", file="use.yaml", lines=_llamafactory),
    # `lengths` is what ms-swift filters and groups by, and demands.
    "swift": Layout(
        host="ms-swift",
        columns=("input_ids", "labels", "lengths"),
        packed=(*PACKED, "lengths"),
        file="use.sh",
        lines=_swift,
    ),
    "unsloth": Layout(host="Unsloth", file="use.py", lines=_unsloth),
    "verl": Layout(
        host="verl", columns=("input_ids", "loss_mask", "position_ids"), form="parquet", file="use.sh", lines=_verl
    ),
    "parquet": Layout(host="Parquet", packed=PACKED, form="parquet", file="use.py", lines=_parquet),
}


def layout_of(to: str, *, packed: bool) -> Layout:
    """The layout called `to`.

    Raises:
        AssetError: `bad_option` for a name that is none, or for packed rows where they cannot be read.
    """
    one_of("to", to, tuple(LAYOUTS), AssetError)
    layout = LAYOUTS[to]
    if packed and layout.packed is None:
        packers = ", ".join(name for name, other in LAYOUTS.items() if other.packed)
        raise AssetError(
            f"{layout.host} reads a packed row as one document, so that documents would see one another.",
            code="bad_option",
            remedy=f"leave --pack out and let {layout.host} pack or flatten by itself; rows can be packed for {packers}.",
        )
    return layout


def _yaml(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _shell(text: str) -> str:
    import shlex

    return shlex.quote(text)
