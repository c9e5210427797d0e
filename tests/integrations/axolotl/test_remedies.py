"""What the core tells a Python user to do, an Axolotl user reads in the words of the YAML."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

from axolotl.utils.dict import DictDefault
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model

from sft_plugins.errors import CollapseError, ContaminationError, MaskingError, SFTPluginsError
from sft_plugins.integrations.axolotl import SFTPlugin
from sft_plugins.integrations.axolotl.plugin import _pack
from sft_plugins.integrations.axolotl.remedies import WORDS, in_yaml, remedies_in_yaml
from sft_plugins.integrations.axolotl.settings import Settings
from sft_plugins.integrations.axolotl.strategy import load
from sft_plugins.integrations.axolotl.watch import collapse_callback
from testkit.tiny_models import build
from testkit.tokenizers import build_tokenizer

STRATEGY = "sft_plugins.integrations.axolotl.strategy"
# Where the errors come from that a run under Axolotl can end with.
REACHED = {
    "masking": ("assemble", "examples", "messages", "overflow", "pairs", "plan", "render"),
    "packing": ("balance", "isolation", "probe", "refusals", "target"),
    "collapse": ("baseline", "callback", "embedder", "probe", "prompts", "teacher"),
}
# Never raised under the plug-in, and why.
UNREACHED = {
    "use backend='auto'": "the plug-in asks for no backend",
    "call isolate(model)": "it has",
    "pack with pack_dataset, not as a stream": "nor streamed",
    "pack them first, `pack_dataset(rows, max_length)`": "rows are packed before they are dealt",
    "extra_columns='drop' leaves them out, 'carry' keeps a list with one value per document": "it drops them",
}
# Keyword arguments, calls and None: no word of a YAML. Data and its repair are shown in Python's notation, and may be.
PYTHON = re.compile(r"\b[a-z]\w*=|\b(?!encode|decode)\w+\((?!\w+ )|\bNone\b|max_length|stop_token_ids|_dataset\b")


def remedies() -> dict[str, str]:
    """Every remedy of those modules as its source has it → the module."""
    found: dict[str, str] = {}
    for package, names in REACHED.items():
        for name in names:
            module = import_module(f"sft_plugins.{package}.{name}")
            for node in ast.walk(ast.parse(inspect.getsource(module))):
                if not isinstance(node, ast.Call):
                    continue
                called = getattr(node.func, "id", "")
                values = [keyword.value for keyword in node.keywords if keyword.arg == "remedy"]
                values += node.args[-1:] if called in ("schema_error", "_refusal") else []
                for value in values:
                    for text in texts(value, module):
                        found[text] = f"{package}/{name}.py"
    return found


def texts(node: ast.expr, module: Any) -> list[str]:
    """What an expression may say; a name that is a constant of the module says that constant."""
    if isinstance(node, ast.IfExp):
        return texts(node.body, module) + texts(node.orelse, module)
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)]
    constant = getattr(module, node.id, None) if isinstance(node, ast.Name) else None
    return [constant] if isinstance(constant, str) else []


def test_no_remedy_that_a_run_can_end_with_is_in_python() -> None:
    found = remedies()
    assert len(found) > 40
    left = {text: place for text, place in found.items() if PYTHON.search(in_yaml(text)) and text not in UNREACHED}
    assert left == {}
    assert found.keys() >= UNREACHED.keys(), "no exception outlives what it excuses"
    in_python = [text for text in found if PYTHON.search(text)]
    assert len(in_python) > 10, "the pattern knows Python when it sees it"


def test_every_line_of_the_table_is_of_use() -> None:
    """Translations of what the core no longer says would be dead."""
    import sft_plugins.packing.collator as collator  # its errors reach a run that packs what an audit only warned of

    said = [*remedies(), *re.findall(r'remedy="([^"]*)"', inspect.getsource(collator))]
    assert [python for python, _ in WORDS if not any(python in remedy for remedy in said)] == []


def test_everything_but_the_remedy_is_kept() -> None:
    cause = OSError("disk")
    with pytest.raises(MaskingError) as caught, remedies_in_yaml():
        raise MaskingError("7 > max_length", code="overflow", row=3, remedy='errors="drop"') from cause
    error = caught.value
    assert (type(error), error.message, error.code, error.row) == (MaskingError, "7 > max_length", "overflow", 3)
    assert str(error) == "[overflow] (row 3) 7 > max_length Remedy: `sft_plugins.masking.errors: drop`"
    assert error.__cause__ is cause
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(SFTPluginsError, match=r"^\[x\] bare$"), remedies_in_yaml():
        raise SFTPluginsError("bare", code="x")
    with pytest.raises(KeyError), remedies_in_yaml():
        raise KeyError("max_length")


# --- where the plug-in passes errors of the core on -------------------------------------------------------------------


def masked(rows: list[dict[str, Any]], **masking: Any) -> Dataset:
    cfg = DictDefault({"sft_plugins": {"masking": masking}, "sequence_len": 32})
    return load(build_tokenizer("qwen"), cfg, DictDefault({"type": STRATEGY})).wrap_dataset(Dataset.from_list(rows))


def chat(answer: str, question: str = "Why?") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (chat("Because. " * 20), r"Raise `sequence_len`, or choose `sft_plugins\.masking\.overflow: drop`"),
        (chat(""), r"`sft_plugins\.masking\.errors: drop` drops such rows"),
        (chat("So.", "<|im_end|>"), r"`sft_plugins\.masking\.special_tokens_in_content: allow` trains it"),
    ],
)
def test_the_strategy_speaks_yaml(row: dict[str, Any], remedy: str) -> None:
    with pytest.raises(MaskingError, match=f"Remedy: .*{remedy}"):
        masked([row])


def test_packing_speaks_yaml() -> None:
    silent = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}])
    long = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    settings = Settings.read({}).packing
    assert settings is not None
    with pytest.raises(SFTPluginsError, match=r"choose `sft_plugins\.packing\.unsupervised: drop`"):
        _pack(silent, 8, settings, strict=True, name="train")
    with pytest.raises(SFTPluginsError, match=r"raise `sequence_len`, or let `sft_plugins\.masking\.overflow`"):
        _pack(long, 2, settings, strict=True, name="train")


def test_isolation_speaks_yaml() -> None:
    virtual = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2
    )  # before the row, not before each document
    model = get_peft_model(build("llama").model, virtual)
    with pytest.raises(ContaminationError, match=r"Remedy: set `sft_plugins\.packing: false` and no `sample_packing`"):
        SFTPlugin().post_model_load(DictDefault({"sft_plugins": {}, "sequence_len": 32}), model)


def test_the_collapse_watch_speaks_yaml(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "prompts.jsonl"
    empty.write_text("")
    settings = Settings.read({"collapse": {"prompts": str(empty)}}).collapse
    assert settings is not None
    with pytest.raises(CollapseError, match=r"`sft_plugins\.collapse\.prompts: builtin`"), remedies_in_yaml():
        collapse_callback(settings, build_tokenizer("qwen"), None)
    callback = collapse_callback(Settings.read({}).collapse, build_tokenizer("qwen"), None)  # type: ignore[arg-type]

    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(callback, "_set_up", fails)
    with pytest.raises(CollapseError, match=r"no memory Remedy: .*set `sft_plugins\.collapse: false`"):
        callback.on_train_begin(None, None, None, model=build("llama").model)
