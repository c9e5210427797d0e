"""What is here to compute with: packages, found by name and not imported, what each adds to packing, and devices."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from sft_plugins.errors import AssetError

PACKAGES = ("sft-plugins", "torch", "transformers", "trl", "peft", "axolotl", "datasets", "accelerate")

_FLASH = "documents told apart by the kernel itself (backend `native`)"


@dataclass(frozen=True)
class Kernel:
    """A package of fast kernels.

    Attributes:
        name: as pip knows it.
        found: its version, None where it is not installed.
        enables: what packed rows gain by it.
        usable: whether it is installed and there is a GPU to run it on.
    """

    name: str
    found: str | None
    enables: str
    usable: bool


# package, module that holds it, what it enables
_KERNELS = (
    ("torch varlen_attn", "torch", "torch.nn.attention.varlen",
     "attention of all documents in one call (backend `varlen`): CUDA, float16 or bfloat16, head sizes up to 256"),
    ("flash-attn", "flash-attn", "flash_attn", f"attn_implementation=flash_attention_2: {_FLASH}"),
    ("flash-attn-3", "flash-attn-3", "flash_attn_interface", f"attn_implementation=flash_attention_3: {_FLASH}"),
    ("kernels", "kernels", "kernels", f"attention kernels from the hub (kernels-community/flash-attn2): {_FLASH}"),
    ("flash-linear-attention", "flash-linear-attention", "fla",
     "linear attention and delta rules that read document boundaries (Qwen3-Next, Kimi Linear, OLMo hybrid …)"),
    ("mamba-ssm", "mamba-ssm", "mamba_ssm", "state-space scans that read document boundaries (Mamba-2, Bamba, Zamba2 …)"),
    ("causal-conv1d", "causal-conv1d", "causal_conv1d", "the convolutions in front of those scans, likewise"),
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Version of Python and of every package that packing may meet; None where it is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def kernels() -> list[Kernel]:
    """The kernel packages that packing can use, found or not."""
    import torch

    gpu = torch.cuda.is_available()
    rows = []
    for name, package, module, enables in _KERNELS:
        found = (_version(package) or "unknown") if _is_there(module) else None
        rows.append(Kernel(name, found, enables, usable=found is not None and gpu))
    return rows


def hardware() -> str:
    """The GPU by name, or what torch computes on without one."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"CPU ({platform.machine()}), no GPU that torch can use"


def choose_device(name: str) -> str:
    """`"auto"` → a GPU if there is one, else the CPU.

    Raises:
        AssetError: `bad_device` for a device that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise AssetError(
            f"--device {name} cannot be used: {str(error).splitlines()[0]}",
            code="bad_device",
            remedy='use "cpu", or "auto" for a GPU if torch sees one.',
        ) from error
    return name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent is missing; a module without a spec
        return False
