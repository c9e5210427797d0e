"""What the core tells a Python user to do, an Axolotl user reads in the words of the YAML."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="the Axolotl plug-in runs in Axolotl's environment")

from axolotl.utils.dict import DictDefault
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model

from sft_plugins import errors
from sft_plugins.errors import CollapseError, ContaminationError, MaskingError, SFTPluginsError, in_words
from sft_plugins.integrations.axolotl import SFTPlugin
from sft_plugins.integrations.axolotl.collators import pack
from sft_plugins.integrations.axolotl.log import NAMES, in_yaml
from sft_plugins.integrations.axolotl.plugin import collapse_callback
from sft_plugins.integrations.axolotl.settings import Settings
from sft_plugins.integrations.axolotl.strategy import load
from testkit.tiny_models import build
from testkit.tokenizers import build_tokenizer

STRATEGY = "sft_plugins.integrations.axolotl.strategy"
PACKAGE = Path(errors.__file__).parent
ROOMS = ("masking", "packing", "collapse")
CORE = [*PACKAGE.glob("_*.py"), *(file for room in ROOMS for file in (PACKAGE / room).rglob("*.py"))]
# Where the errors come from that a run under Axolotl can end with.
REACHED = {
    "formats", "messages", "labels", "turns", "overflow", "template", "apply", "deal_rows", "probe", "documents",
    "_models", "_rows", "baseline", "callback", "session", "embedder", "prompts", "teacher_forcing",
}  # fmt: skip
# Never raised under the plug-in, and why.
UNREACHED = {
    "use backend='auto'": "the plug-in asks for no backend",
    "call isolate(model)": "it has",
    "call isolate(model) when all adapters are on it, or take off what was put on": "it does, after the adapter",
    "take the rows that those were made from; packed rows are for BlockDiagonalPackingCollator(rows='packed')": "it packs",
    "the template writes one and the tokenizer adds another: tokenise with add_special_tokens=False": "the strategy does",
    "seq_lengths holds the tokens of each document; take the rows as pack_dataset made them, and of trees "
    "(share_prefixes) keep the columns seq_parents and seq_depths": "it did",
    "remove_unused_columns=False keeps the columns": "the YAML's `remove_unused_columns: true` is refused",
    "take the rows as pack_dataset made them": "it did",
    "extra_columns='drop' leaves them out, 'carry' keeps a list with one value per document": "it drops them",
}
# Keyword arguments, calls and None: no word of a YAML. Data and its repair are shown in Python's notation, and may be.
PYTHON = re.compile(r"\b[a-z]\w*=|\b(?!encode|decode)\w+\((?!\w+ )|\bNone\b|max_length|stop_token_ids|_dataset\b")


def remedies(paths: list[Path] = CORE) -> dict[str, str]:
    """Every remedy of `paths` as its source has it → its file."""
    found: dict[str, str] = {}
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = assigned(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "id", "")
            # `stream` is the remedy that a caller of `stored_rows` hands on.
            values = [keyword.value for keyword in node.keywords if keyword.arg in ("remedy", "stream")]
            values += node.args[-1:] if called in ("schema_error", "_refusal") else []
            for value in values:
                for text in texts(value, named):
                    found[text] = str(path.relative_to(PACKAGE))
    return found


def assigned(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """Each name of a module, of its functions too → all that is ever assigned to it; a parameter: nothing but that."""
    named: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            named.setdefault(node.arg, [])
        for target in node.targets if isinstance(node, ast.Assign) else []:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for to, value in pairs:
                if isinstance(to, ast.Name):
                    named.setdefault(to.id, []).append(value)
    return named


def texts(node: ast.expr, named: dict[str, list[ast.expr]]) -> list[str]:
    """What an expression may say; a parameter says what its callers do, who are read where they stand."""
    match node:
        case ast.Constant():
            return [node.value] if isinstance(node.value, str) else []
        case ast.JoinedStr():
            return [
                "".join(str(part.value) if isinstance(part, ast.Constant) else inserted(part) for part in node.values)
            ]
        case ast.IfExp():
            return texts(node.body, named) + texts(node.orelse, named)
        case ast.BoolOp():
            return [text for value in node.values for text in texts(value, named)]
        case ast.BinOp(op=ast.Add()):
            return [left + right for left in texts(node.left, named) for right in texts(node.right, named)]
        case ast.Dict():
            return [text for value in node.values for text in texts(value, named)]
        case ast.Name():
            return [text for value in named[node.id] for text in texts(value, named)]
        case ast.Attribute(attr="remedy") | ast.Call(func=ast.Name(id="getattr")):
            return []  # of an error that was raised, and read, elsewhere
        case ast.Call(func=ast.Attribute(attr="get")):
            return [text for value in (node.func.value, *node.args[1:]) for text in texts(value, named)]
    raise AssertionError(f"line {node.lineno}: {ast.unparse(node)} is a remedy that this test cannot read")


def inserted(part: ast.expr) -> str:
    """What is not known before it runs, but for the one helper that writes a name of its own."""
    called = getattr(getattr(getattr(part, "value", None), "func", None), "id", "")
    return "{ignore_columns:…}" if called == "ignoring" else "…"


def test_every_name_in_a_remedy_has_its_word_in_the_yaml_and_every_word_is_of_use() -> None:
    named = {found["name"] for text in remedies() for found in errors._NAMED.finditer(text)}
    assert named == NAMES.keys()


def test_no_remedy_that_a_run_can_end_with_is_in_python() -> None:
    files = [path for path in CORE if path.stem in REACHED]
    assert {path.stem for path in files} == REACHED
    found = remedies(files)
    assert len(found) > 40
    left = {
        text: place for text, place in found.items() if PYTHON.search(in_words(text, NAMES)) and text not in UNREACHED
    }
    assert left == {}
    assert found.keys() >= UNREACHED.keys(), "no exception outlives what it excuses"
    in_python = [text for text in found if PYTHON.search(in_words(text))]
    assert len(in_python) > 10, "the pattern knows Python when it sees it"


def test_without_a_hosts_names_a_remedy_is_in_pythons_words() -> None:
    error = MaskingError(
        "m", code="c", remedy='Raise {max_length}, or {errors:errors="drop"} it; {"prompt": "…"} stays.'
    )
    assert error.remedy == 'Raise max_length, or errors="drop" it; {"prompt": "…"} stays.'
    for same in (error, error.at_row(3), pickle.loads(pickle.dumps(error)).at_row(3)):
        told = same.in_words(NAMES)
        assert told.remedy == 'Raise `sequence_len`, or `sft_plugins.masking.errors: drop` it; {"prompt": "…"} stays.'
        assert (told.row, told.code, told.message) == (same.row, "c", "m")


def test_everything_but_the_remedy_is_kept() -> None:
    cause = OSError("disk")
    with pytest.raises(MaskingError) as caught, in_yaml():
        raise MaskingError("7 > max_length", code="overflow", row=3, remedy="{errors}") from cause
    error = caught.value
    assert (type(error), error.message, error.code, error.row) == (MaskingError, "7 > max_length", "overflow", 3)
    assert str(error) == "[overflow] (row 3) 7 > max_length Remedy: `sft_plugins.masking.errors: drop`"
    assert error.__cause__ is cause
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(SFTPluginsError, match=r"^\[x\] bare$"), in_yaml():
        raise SFTPluginsError("bare", code="x")
    with pytest.raises(KeyError), in_yaml():
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
        pack(silent, 8, settings, strict=True, name="train")
    with pytest.raises(SFTPluginsError, match=r"raise `sequence_len`, or let `sft_plugins\.masking\.overflow`"):
        pack(long, 2, settings, strict=True, name="train")


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
    with pytest.raises(CollapseError, match=r"`sft_plugins\.collapse\.prompts: builtin`"), in_yaml():
        collapse_callback(settings, build_tokenizer("qwen"), None)
    callback = collapse_callback(Settings.read({}).collapse, build_tokenizer("qwen"), None)  # type: ignore[arg-type]

    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(callback, "_set_up", fails)
    with pytest.raises(CollapseError, match=r"no memory Remedy: .*set `sft_plugins\.collapse: false`"):
        callback.on_train_begin(None, None, None, model=build("llama").model)
