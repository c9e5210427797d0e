"""What cannot be isolated is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from sft_plugins.errors import ContaminationError, SFTPluginsError
from sft_plugins.packing.isolation.apply import check_isolation, isolate
from testkit.isolated import TINY, documents_of, tiny_llama, zero
from testkit.isolation_oracle import gap, packed_batch, run_alone, run_packed
from testkit.tiny_models import build


def test_wrappers_are_looked_through() -> None:
    tiny = build("llama")
    assert isolate(torch.compile(tiny.model, backend="eager")).model == "LlamaForCausalLM"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny.model)
        alone = run_alone(tiny.model, documents_of(tiny), gradients=False)
        assert isolate(wrapped).backend == "varlen"
        assert gap(alone, run_packed(wrapped, documents_of(tiny), gradients=False)).logits <= 1e-5
    finally:
        torch.distributed.destroy_process_group()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_llama()


def encoder() -> nn.Module:
    return BertForMaskedLM(BertConfig(**TINY))


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32))


def prompt_tuned() -> nn.Module:
    return get_peft_model(tiny_llama(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda: nn.Linear(2, 2), "not_causal_lm", "Linear is no model with an LM head"),
        (lambda: tiny_llama().model, "not_causal_lm", "LlamaModel"),
        (lambda: "llama", "not_causal_lm", "got str"),
        (encoder_decoder, "not_causal_lm", "encoder-decoder"),
        (encoder, "not_causal", "moves earlier logits"),
        (on_meta, "meta_device", "meta device"),
        (lambda: zero(tiny_llama()), "probe_blind", "do not depend on earlier tokens"),
        (prompt_tuned, "prompt_learning", "PromptTuningConfig"),
        (lambda: nn.DataParallel(tiny_llama()), "data_parallel", "DataParallel"),
    ],
)
def test_what_cannot_be_isolated_is_refused_by_name(make: Any, code: str, says: str) -> None:
    for function in (isolate, check_isolation):
        with pytest.raises(ContaminationError, match=says) as caught:
            function(make())
        assert caught.value.code == code
        assert caught.value.remedy


def test_an_unknown_backend_is_refused_naming_the_known() -> None:
    with pytest.raises(ValueError, match="'auto', 'varlen', 'native', 'unpack'"):
        isolate(tiny_llama(), backend="flash")


def test_a_prompt_adapter_added_later_is_refused_in_the_forward() -> None:
    """Virtual tokens lengthen the row, and PEFT drops its positions: neither keys nor positions pass for ordinary."""
    tiny = build("llama")
    isolate(tiny.model)
    tuned = get_peft_model(tiny.model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    batch = packed_batch(documents_of(tiny))
    for given in (batch, {key: batch[key] for key in ("input_ids", "position_ids")}, {"input_ids": batch["input_ids"]}):
        with pytest.raises(SFTPluginsError) as caught:
            tuned(**given)
        assert caught.value.code == ("boundaries" if "cu_seq_lens_q" in given else "prompt_learning")


def test_prefix_tuning_added_later_is_refused_in_the_forward() -> None:
    tiny = build("llama")
    isolate(tiny.model)
    tuned = get_peft_model(tiny.model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    batch = packed_batch(documents_of(tiny))
    for given in ({key: batch[key] for key in ("input_ids", "position_ids")}, {"input_ids": batch["input_ids"]}):
        with pytest.raises(ContaminationError) as caught:
            tuned(**given)
        assert caught.value.code in ("prompt_learning", "cache_with_boundaries")
