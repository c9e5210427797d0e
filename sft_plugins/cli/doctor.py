"""`sft-plugins doctor`: is packing exact on this model, this backend, this machine, and what would make it faster?"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sft_plugins.cli.ui import options
from sft_plugins.cli.ui.command import add_command
from sft_plugins.cli.ui.inputs import step
from sft_plugins.cli.ui.output import EXIT_FINDINGS, EXIT_OK, Output
from sft_plugins.errors import AssetError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from sft_plugins.preflight import Diagnosis, Twin

_EPILOG = (
    "Examples: sft-plugins doctor --model ./model | sft-plugins doctor --model-type gpt_oss | "
    "sft-plugins doctor -m ./model --weights --dtype bfloat16 --attn sdpa --device cuda. Exit codes: 0 packing is exact "
    "with isolate(model), 1 it cannot be, 2 unusable input."
)
_DTYPES = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
    "fp32": "float32", "bf16": "bfloat16", "fp16": "float16",
}  # fmt: skip
_STYLES = {"exact": "green", "leaks": "bold red", "fails": "bold red", "unmeasured": "bright_black"}


def register(app: typer.Typer) -> None:
    add_command(app, doctor, epilog=_EPILOG)


def doctor(
    out: Output,
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A folder with config.json, or a hub id. No weights are read.")
    ] = None,
    model_type: Annotated[
        str | None, typer.Option(help="An architecture by name instead of --model: llama, gpt_oss, mamba2 …")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Load the model itself, rather than a narrow twin of its architecture.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help='float32, bfloat16, float16; "auto" is float32 on a CPU, bfloat16 on a GPU.')
    ] = "auto",
    attn: Annotated[
        str | None,
        typer.Option(help="Attention implementation: eager, sdpa, flash_attention_2 …; the model's own default."),
    ] = None,
    device: options.DEVICE = "auto",
) -> int:
    """Measure whether documents of a packed row see each other on this model and machine: as it comes, and isolated."""
    with step(out, "loading torch and transformers"):
        from sft_plugins import preflight

    where, config = _configuration(model, model_type, weights=weights)
    with step(out, "building the model"):
        subject = _subject(where, config, weights=weights, dtype=dtype, attn=attn, device=device)
    with step(out, "measuring packed rows"):
        diagnosis = preflight.diagnose(subject)
    versions, kernels = preflight.versions(), preflight.kernels()
    elsewhere = preflight.on_a_gpu(diagnosis, config)
    _show(out, where, diagnosis)
    out.console.print(_environment(preflight.hardware(), versions))
    out.console.print(_kernels(kernels))
    if elsewhere:
        out.console.print(Text("On a CUDA GPU", "bold"))
    for line in elsewhere:
        out.console.print(Text(f"· {line}"))
    out.emit(
        {
            "command": "doctor",
            "model": where,
            "ok": diagnosis.exact,
            "diagnosis": diagnosis.to_dict(),
            "hardware": preflight.hardware(),
            "versions": versions,
            "kernels": kernels,
            "on_a_gpu": elsewhere,
        }
    )
    return EXIT_OK if diagnosis.exact else EXIT_FINDINGS


def _configuration(model: str | None, model_type: str | None, *, weights: bool) -> tuple[str, PretrainedConfig]:
    """What to call the model, and its configuration."""
    from sft_plugins.preflight import load_config

    if (model is None) == (model_type is None) or (weights and model is None):
        raise AssetError(
            "--weights needs --model." if weights else "exactly one of --model and --model-type is needed.",
            code="bad_option",
            remedy="give --model a folder or a hub id, or --model-type an architecture's name, such as llama.",
        )
    if model is not None:
        return model, load_config(model)
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    name = str(model_type)
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=4, cutoff=0.5)
        raise AssetError(
            f"--model-type {name}: transformers knows no causal language model of that name.",
            code="bad_option",
            remedy=f"did you mean {', '.join(close)}?" if close else "use the `model_type` of a config.json.",
        )
    try:
        config: PretrainedConfig = CONFIG_MAPPING[name]()
        if hasattr(config, "is_decoder"):  # encoders by default; as a causal language model they are asked for here
            config.is_decoder = True
    except Exception as error:  # configurations validate themselves in their own ways
        raise AssetError(
            f"--model-type {name}: its default configuration cannot be used: {error}",
            code="bad_option",
            remedy="give --model a folder with a config.json of that architecture.",
        ) from error
    return name, config


def _subject(
    where: str, config: PretrainedConfig, *, weights: bool, dtype: str, attn: str | None, device: str
) -> nn.Module | Twin:
    from sft_plugins.preflight import choose_device, load_weights, twin

    _check_attention(attn)
    chosen = choose_device(device)
    precision = _dtype(dtype, chosen)
    if weights:
        options = {} if attn is None else {"attn_implementation": attn}
        return load_weights(where, dtype=precision, **options).to(chosen)
    made = twin(config, dtype=precision, attn=attn)
    made.model.to(chosen)
    return made


def _dtype(name: str, device: str) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise AssetError(
            f"--dtype {name} is unknown.", code="bad_option", remedy=f'use "auto" or one of {", ".join(_DTYPES)}.'
        )
    chosen: torch.dtype = getattr(torch, _DTYPES[name])
    return chosen


def _check_attention(attn: str | None) -> None:
    from transformers import AttentionInterface

    known = ["eager", *sorted(name for name in AttentionInterface().valid_keys() if "|" not in name)]
    if attn is not None and attn not in known and "/" not in attn:  # owner/name is a kernel of the hub
        raise AssetError(
            f"--attn {attn} is unknown.",
            code="bad_option",
            remedy=f"use one of {', '.join(known)}, or a kernel of the hub (owner/name).",
        )


def _show(out: Output, where: str, diagnosis: Diagnosis) -> None:
    """The verdict, and the table that it rests on."""
    from sft_plugins.preflight import WAYS

    report = diagnosis.report
    out.console.print(Text(where, "bold"), Text(f"· {diagnosis.what}"))
    table = Table(title="What documents of one row make of each other", title_justify="left")
    table.add_column("packed row", overflow="fold")
    table.add_column("documents", no_wrap=True)
    table.add_column("difference", justify="right")
    for name, words in WAYS.items():
        way = diagnosis.way(name)
        last = name == list(WAYS)[-1]
        table.add_row(words, Text(way.verdict, _STYLES[way.verdict]), _number(way.difference), end_section=last)
    if report is not None:
        changed = "bit for bit" if report.perturbed_delta == 0 else f"within {report.perturbed_delta:.0e}"
        isolated = Text.assemble(("isolate(model)", "bold"), f", backend {report.backend}")
        table.add_row(isolated, Text("exact", "green"), _number(report.alone_delta))
        table.add_row("  other documents replaced", Text("unmoved", "green"), changed)
        trees = Text("exact", "green") if report.prefix_trees else Text("refused", "yellow")
        table.add_row("  rows of trees (share_prefixes)", trees, "")
    else:
        table.add_row(Text("isolate(model)", "bold"), Text(f"refused: {diagnosis.code}", "bold red"), "")
    out.console.print(table)
    if diagnosis.tolerance is not None:
        allowed = f"Difference from each document run alone, relative to the largest logit; allowed {diagnosis.tolerance:.0e}."
        out.console.print(Text(allowed, "bright_black"))
    for way in diagnosis.ways:
        if way.error:
            out.console.print(Text(f"{WAYS[way.name]}: {way.error}", "bright_black"))
    out.console.print(verdict(diagnosis))
    for note in () if report is None else report.notes:
        out.console.print(Text(f"· {note}", "bright_black"))


def verdict(diagnosis: Diagnosis) -> Text:
    """One sentence that can be acted on."""
    report = diagnosis.report
    if report is None:
        return Text.assemble(("Packing cannot be exact here: ", "bold red"), f"{diagnosis.refusal}.")
    text = Text.assemble(("Packing is exact here with isolate(model), ", "bold green"), f"backend {report.backend}. ")
    if diagnosis.plain == "exact":
        cached = diagnosis.way("all_keys_cached").verdict
        text.append("Position ids alone isolate too" + (", while no KV cache is made." if cached != "exact" else "."))
    elif diagnosis.plain == "leaks":
        text.append("Without it documents see each other, and nothing warns.")
    else:
        text.append("Without it the model raises on a packed row.")
    return text


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1g}"


def _environment(hardware: str, versions: dict[str, str | None]) -> Text:
    installed = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    missing = ", ".join(name for name, found in versions.items() if not found)
    text = Text.assemble(("Here: ", "bold"), f"{hardware}; {installed}")
    return text.append(f"; not installed: {missing}", "bright_black") if missing else text


def _kernels(rows: list[Any]) -> Table:
    table = Table(title="Kernels", title_justify="left")
    table.add_column("package", overflow="fold")
    table.add_column("found", overflow="fold")
    table.add_column("what it enables", overflow="fold")
    for kernel in rows:
        style = "green" if kernel.usable else ""
        found = Text(kernel.found or "no", style or "bright_black")
        if kernel.found and not kernel.usable:
            found.append(", needs a GPU")
        table.add_row(kernel.name, found, kernel.enables)
    return table
