"""`sft-plugins doctor` says whether packing is exact, on a twin that has every kind of layer of the model it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from sft_plugins.errors import AssetError
from sft_plugins.packing import isolate
from sft_plugins.preflight import doctor
from sft_plugins.preflight.tiny_model.twin import layer_kinds, twin
from testkit.commands import invoke
from testkit.isolation_matrix import examine
from testkit.leaky import LEAKS
from testkit.tiny_models import build


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and nothing else: 8 billion weights are not needed."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8).save_pretrained(
        folder
    )
    return folder


def examined(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = invoke("doctor", *arguments, "--json")
    return done.exit_code, json.loads(done.stdout)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_model_of_any_size_is_examined_without_its_weights(llama: Path) -> None:
    """P1, P3: exact with isolate; what it is without is measured, whatever that comes to."""
    code, found = examined("--model", llama)
    diagnosis = found["diagnosis"]
    assert (code, found["ok"], diagnosis["exact"]) == (0, True, True)
    assert (diagnosis["report"]["backend"], diagnosis["report"]["prefix_trees"]) == ("varlen", True)
    verdicts = {way["name"]: way["verdict"] for way in diagnosis["ways"]}
    assert list(verdicts) == ["end_to_end", "position_ids", "all_keys", "all_keys_cached"]
    assert verdicts.pop("end_to_end") == "leaks"
    assert set(verdicts.values()) <= {"exact", "leaks", "fails"}
    assert diagnosis["twin"] == "LlamaForCausalLM, 2 of 32 layers, hidden size 32 of 4096, vocabulary 96 of 32,000"
    assert found["versions"]["torch"] == torch.__version__
    assert {kernel["name"] for kernel in found["kernels"]} >= {"torch varlen_attn", "flash-attn", "mamba-ssm"}
    assert torch.cuda.is_available() or "head size 128" in found["on_a_gpu"][0]


def test_the_terminal_shows_what_was_measured_and_what_it_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1: this model leaks with every boundary key, and nothing but this says so."""
    monkeypatch.setenv("COLUMNS", "60")
    AutoConfig.for_model("leaky_attention").save_pretrained(tmp_path)
    done = invoke("doctor", "--model", tmp_path)
    assert done.exit_code == 0
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith(("┏", "│", "└"))) == 60, (
        "tables fit, prose is the pipe's"
    )
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "Packing is exact here with isolate(model), backend varlen. Without it documents see each other" in words
    assert words.count("leaks") == len(doctor.WAYS)
    assert "rows of trees" in words


def test_a_model_that_cannot_be_packed_is_exit_code_1(tmp_path: Path) -> None:
    code, found = examined("--model-type", "cpmant", "--dtype", "bf16")
    assert (code, found["ok"], found["diagnosis"]["code"]) == (1, False, "not_causal")
    assert found["diagnosis"]["dtype"] == "bfloat16"
    assert found["on_a_gpu"] == []
    done = invoke("doctor", "--model-type", "cpmant", "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "")


def test_the_real_weights_are_examined_on_request(tmp_path: Path) -> None:
    build("llama").model.save_pretrained(tmp_path)
    code, found = examined("--model", tmp_path, "--weights", "--attn", "eager", "--dtype", "float32")
    assert code == 0
    assert found["diagnosis"]["twin"] is None
    assert (found["diagnosis"]["attention"], found["diagnosis"]["device"]) == ("eager", "cpu")


BAD: dict[str, tuple[list[str], str, str]] = {
    "neither a model nor a type": ([], "bad_option", "exactly one of --model and --model-type"),
    "weights of a type": (["--model-type", "llama", "--weights"], "bad_option", "--weights needs --model"),
    "no such folder": (["--model", "./none"], "missing_file", "there is no such folder"),
    "folder without config": (["--model", "EMPTY"], "bad_model", "configuration"),
    "unknown attention": (["--model-type", "llama", "--attn", "fast"], "bad_option", "--attn fast is unknown"),
    "attention not here": (["--model-type", "opt", "--attn", "flash_attention_2"], "bad_option", "cannot be built"),
    "unknown dtype": (["--model-type", "llama", "--dtype", "int3"], "bad_option", "--dtype int3"),
    "unknown device": (["--model-type", "llama", "--device", "tpu:9"], "bad_device", "--device tpu:9"),
    "unknown type": (["--model-type", "lama"], "bad_option", "did you mean llama"),
    "no weights": (["--model", "LLAMA", "--weights"], "bad_model", "causal language model"),
    "hub unreachable": (["--model", "owner/none"], "model_unreachable", "owner/none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_with_a_remedy(
    case: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "attention not here" and torch.cuda.is_available():
        pytest.skip("may well be installed where there is a GPU")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments, code, words = BAD[case]
    places = {"EMPTY": str(tmp_path), "LLAMA": str(llama)}
    done = invoke("doctor", *(places.get(argument, argument) for argument in arguments), "--json")
    assert done.exit_code == 2, done.output
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert words in f"{error['message']} {error['remedy']}"
    assert error["remedy"]
    assert "Traceback" not in done.stderr


# --- the diagnosis ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["opt", "bloom", "gpt_oss", "mamba2", "qwen3_next", "falcon", "gemma2", "deepseek_v3", *LEAKS]
)
def test_the_twin_of_an_architecture_is_judged_as_the_isolation_matrix_judges_it(name: str) -> None:
    """P1, P3, P5: the twin of the default configuration, beside the matrix's own model, documents and oracle."""
    row = examine(name)
    found = doctor.diagnose(twin(CONFIG_MAPPING[name]()))
    assert found.report is not None
    assert found.way("all_keys").verdict == row.today.split()[0].replace("raises", "fails")
    assert found.way("all_keys_cached").verdict == row.today_with_cache.split()[0].replace("raises", "fails")
    assert found.report.backend == row.backend


def test_a_diagnosis_leaves_the_model_and_its_isolation_as_they_were() -> None:
    model = build("leaky_attention").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(4, 20)[None]
    logits = model(ids).logits
    plain = doctor.diagnose(model)
    assert plain.plain == "leaks"
    assert torch.equal(model(ids).logits, logits)
    isolate(model)
    again = doctor.diagnose(model)
    assert again.ways == plain.ways, "what the bare model does, though it is isolated"
    from sft_plugins.packing.isolation.forward import installed_backend

    backend = installed_backend(model)
    assert backend is not None
    assert backend.name == "varlen"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the twin ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[PreTrainedConfig, int]] = {
    "alike": (LlamaConfig(num_hidden_layers=40), 2),
    "listed: sliding and full": (CONFIG_MAPPING["gemma3_text"](num_hidden_layers=34), 2),
    "by period: scan, attention, experts": (CONFIG_MAPPING["jamba"](), 5),
    "by place: dense first, then experts": (CONFIG_MAPPING["deepseek_v3"](first_k_dense_replace=3), 4),
    "shared keys and values": (CONFIG_MAPPING["gemma3n_text"](), 6),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_twin_has_every_kind_of_layer_in_few_layers(case: str) -> None:
    config, layers = KINDS[case]
    made = twin(config).model
    assert made.config.num_hidden_layers == layers
    assert made.num_parameters() < 200_000
    whole = layer_kinds(_full_depth(config))
    assert set(layer_kinds(made)) == set(whole)
    firsts = sorted({kind: whole.index(kind) for kind in whole}.values())
    order = [whole[i] for i in firsts]
    kinds = list(dict.fromkeys(layer_kinds(made)))
    assert kinds == order, "kinds come in the order in which the model has them"


def _full_depth(config: PreTrainedConfig) -> torch.nn.Module:
    from sft_plugins.preflight.tiny_model.narrow import narrow

    return AutoModelForCausalLM.from_config(narrow(config, layers="all"))


def test_what_a_model_computes_is_kept_and_its_sizes_are_not() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    config = CONFIG_MAPPING["phi3"](
        hidden_size=3072, num_attention_heads=32, hidden_act="gelu", sliding_window=2047,
        max_position_embeddings=131072, rope_parameters=rope, attention_dropout=0.1,
    )  # fmt: skip
    made = twin(config).model.config
    assert (made.hidden_act, made.sliding_window, made.attention_dropout) == ("gelu", 7, 0.0)
    assert made.rope_parameters["rope_type"] == "longrope"
    assert made.rope_parameters["long_factor"] == [2.0] * 4
    assert twin(GPT2Config(scale_attn_by_inverse_layer_idx=True)).model.config.scale_attn_by_inverse_layer_idx is True


def test_a_quantised_model_has_a_twin_that_is_not(tmp_path: Path) -> None:
    config = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    config.save_pretrained(tmp_path)
    assert twin(AutoConfig.from_pretrained(tmp_path)).model.dtype == torch.float32


def test_what_is_no_causal_language_model_has_no_twin() -> None:
    with pytest.raises(AssetError, match="no narrow twin of a t5 model") as caught:
        twin(CONFIG_MAPPING["t5"]())
    assert caught.value.code == "no_twin"
