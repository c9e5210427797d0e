"""Leave no trace: everything a probe may move is put back, whatever happens inside it.

Saved and restored by `untouched(model)`, in this order of importance:

| what | why a probe moves it |
| --- | --- |
| RNG of Python, NumPy, torch on CPU and on the accelerator | sampling draws from it, and dropout draws next (C2) |
| `training` of every module, each by itself | dropout must be off; a frozen part may be in eval mode already (C5) |
| `requires_grad` of every parameter | PEFT's `disable_adapter()` rewrites it (C4) |
| `use_cache` and the generation configuration | `generate` and PEFT assign them |
| buffers and plain attributes of modules | rotary embeddings with dynamic scaling grow with the longest text seen |
| layout of 4-bit weights | bitsandbytes changes it for inference on a CPU, for good |
| truncation and padding of the tokenizer's backend, `padding_side` | tokenising sets the first; hosts set the second |

Gradient checkpointing is not toggled: transformers' layers use it only while `training` is true, so evaluation mode
alone gives generation its KV cache back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["adapter_off", "seeded", "untouched", "without_autocast"]

# Above this size a buffer is no scratch value (an old architecture's causal mask, say), and a copy would cost memory.
_BUFFER_BYTES = 2**20
_PLAIN = (bool, int, float, str, type(None), torch.Tensor)
_FOUR_BIT_SWITCH = "support_avx512bf16_for_cpu"


@contextmanager
def untouched(model: nn.Module, tokenizer: Any = None) -> Iterator[None]:
    """Evaluation mode without gradients inside; outside, every state listed above as it was, also after an exception.

    Restoring runs in an `ExitStack`: one part that cannot be restored does not keep the others from it, and the failure
    is raised.
    """
    with ExitStack() as stack:
        for restore in (_rng(), _buffers(model), _attributes(model), _configs(model), _requires_grad(model)):
            stack.callback(restore)
        if tokenizer is not None:
            stack.callback(_tokenizer(tokenizer))
        for module in model.modules():
            # Not model.eval(): some modules override train() and do work in it (merging an adapter, say).
            module.training = False
        stack.enter_context(torch.no_grad())
        stack.callback(_four_bit(model))
        yield


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """PEFT's `disable_adapter()`, which leaves frozen weights trainable (peft 0.20–0.21), with `requires_grad` kept."""
    restore = _requires_grad(model)
    try:
        with model.disable_adapter():
            yield
    finally:
        restore()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside; every generator continues as if nothing had been drawn, outside."""
    restore = _rng()
    try:
        torch.manual_seed(seed)  # also seeds every accelerator
        yield
    finally:
        restore()


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Run the parts of `model` in the types of their weights, whatever its forward is wrapped in (accelerate's autocast)."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    entered: list[ExitStack] = []

    # A context that ends in another function than it began in cannot be compiled.
    @torch.compiler.disable
    def enter(*_: Any) -> None:
        stack = ExitStack()
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        entered.append(stack)

    @torch.compiler.disable
    def leave(*_: Any) -> None:
        entered.pop().close()

    with ExitStack() as stack:
        for part in model.children():
            stack.callback(part.register_forward_pre_hook(enter).remove)
            stack.callback(part.register_forward_hook(leave, always_call=True).remove)
        yield


def _rng() -> Callable[[], None]:
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = _device_module()
    accelerators = [] if device is None else [device.get_rng_state(i) for i in range(device.device_count())]

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if device is not None:
            for i, state in enumerate(accelerators):
                device.set_rng_state(state, i)

    return restore


def _device_module() -> Any:
    """`torch.cuda`, `torch.xpu` …, where one is in use; None on a machine without, or before its first use."""
    if not torch.accelerator.is_available():
        return None
    module = torch.get_device_module()
    if getattr(module, "is_initialized", lambda: True)() and hasattr(module, "device_count"):
        return module
    return None


def _requires_grad(model: nn.Module) -> Callable[[], None]:
    saved = [(p, p.requires_grad) for p in model.parameters()]

    def restore() -> None:
        for parameter, flag in saved:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)

    return restore


def _attributes(model: nn.Module) -> Callable[[], None]:
    """`training` and every other plain value that a module carries (longest length seen, adapters disabled, …)."""
    saved = [
        (module, {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)})
        for module in model.modules()
        # FSDP's wrappers set themselves up in their first forward; that is no trace of ours.
        if not type(module).__module__.startswith("torch.distributed")
    ]
    training = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, flag in training:
            module.training = flag
        for module, values in saved:
            now = vars(module)
            for name, value in values.items():
                if name in now and now[name] is not value:
                    now[name] = value

    return restore


def _buffers(model: nn.Module) -> Callable[[], None]:
    saved: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor | None]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                small = buffer.numel() * buffer.element_size() <= _BUFFER_BYTES
                saved.append((module, name, buffer, buffer.clone() if small else None))

    def restore() -> None:
        with torch.no_grad():
            for module, name, buffer, content in saved:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                if content is not None and not torch.equal(buffer, content):
                    buffer.copy_(content)

    return restore


def _configs(model: nn.Module) -> Callable[[], None]:
    """Values of `config.use_cache` (the text part's too) and of every generation configuration in the model."""
    saved: list[tuple[Any, dict[str, Any]]] = []
    owners: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        generation = vars(module).get("generation_config")
        if generation is not None:
            owners.append((module, generation))
            saved.append((generation, dict(vars(generation))))
        config = vars(module).get("config")
        for part in (config, *(getattr(config, name, None) for name in ("text_config", "decoder"))):
            if hasattr(part, "use_cache"):
                saved.append((part, {"use_cache": part.use_cache}))

    def restore() -> None:
        for module, generation in owners:
            if vars(module).get("generation_config") is not generation:
                module.generation_config = generation
        for target, values in saved:
            for name, value in values.items():
                if getattr(target, name, None) is not value:
                    setattr(target, name, value)

    return restore


def _four_bit(model: nn.Module) -> Callable[[], None]:
    """Forwards in evaluation mode leave the layout of 4-bit weights alone, until restored.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 lays a 4-bit layer's weight out anew at its first forward in evaluation
    mode, for good: from then on the layer passes no gradient back, in training mode either, and nothing is said.
    """
    layers = [module for module in model.modules() if getattr(module, _FOUR_BIT_SWITCH, False)]
    for layer in layers:
        setattr(layer, _FOUR_BIT_SWITCH, False)

    def restore() -> None:
        for layer in layers:
            setattr(layer, _FOUR_BIT_SWITCH, True)

    return restore


def _tokenizer(tokenizer: Any) -> Callable[[], None]:
    side, backend = tokenizer.padding_side, getattr(tokenizer, "_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)

    def restore() -> None:
        if tokenizer.padding_side != side:
            tokenizer.padding_side = side
        if backend is None:
            return
        if backend.truncation != truncation:
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        if backend.padding != padding:
            backend.enable_padding(**padding) if padding else backend.no_padding()

    return restore
