"""Every causal language model of transformers packs exactly, or is refused with its reason written down.

Tiny models of every architecture (see `testkit.tiny_models`), fp32, documents of 1 to 17 tokens in one row. The table
of what was found is printed at the end of the run; `python tests/packing/isolation/matrix_table.py` keeps it in
`docs/isolation-matrix.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from testkit.isolation_matrix import GRADIENTS, LOGITS, MAY_BE_REFUSED, NO_GRADIENTS, REFUSED, Examined, examine, table
from testkit.tiny_models import PAGE, WINDOW, architectures, not_examined

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[dict[str, Examined]]:
    """What each architecture was found to do; printed when the last one is through."""
    found: dict[str, Examined] = {}
    yield found
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    if terminal is not None and found:
        terminal.write_line("")
        for line in table([found[name] for name in sorted(found)]):
            terminal.write_line(line)


@pytest.mark.parametrize("name", architectures())
def test_packed_documents_equal_documents_run_alone(name: str, rows: dict[str, Examined]) -> None:
    """P1, P3, P5, P6: logits, loss and gradients of every document, and no document moved by another."""
    row = rows[name] = examine(name)
    assert row.refusal == REFUSED.get(name, ("",))[0] or (name, row.refusal) in MAY_BE_REFUSED
    _assert_exact(row)


def _assert_exact(row: Examined) -> None:
    assert row.found.logits <= LOGITS, row
    assert row.found.loss <= LOGITS, row
    assert row.found.gradients <= GRADIENTS, row
    assert row.spill <= LOGITS, row
    # The guard: with isolation off and boundaries withheld, the same comparison fails, and not by a little.
    assert row.plain.logits > 100 * LOGITS, row
    assert row.name in NO_GRADIENTS or row.plain.gradients > 10 * GRADIENTS, row


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon with ALiBi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, ALiBi, eager": ("falcon", {"alibi": True, "attn_implementation": "eager"}),
    "gemma4 with experts and shared keys": (
        "gemma4_text",
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
    ),
    "gemma2, eager": ("gemma2", {"attn_implementation": "eager"}),
    "gpt2 with cross-layer scaling": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "jamba, eager": ("jamba", {"attn_implementation": "eager"}),
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
    "mixtral with a window": ("mixtral", {"sliding_window": WINDOW}),
    "multi-query gpt_bigcode, eager": ("gpt_bigcode", {"multi_query": True, "attn_implementation": "eager"}),
    "phi3 with a window": ("phi3", {"sliding_window": WINDOW}),
    "qwen2 with windows": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "starcoder2 with a window": ("starcoder2", {"sliding_window": WINDOW}),
}


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_options_of_real_checkpoints_pack_exactly_too(name: str, changes: dict[str, Any]) -> None:
    _assert_exact(examine(name, **changes))


def test_every_architecture_was_examined() -> None:
    """What a newer transformers brings ends no run before somebody has looked at it, and is named at the end of each."""
    if new := not_examined():
        pytest.skip(f"not examined: {', '.join(new)}; `python tests/packing/isolation/matrix_table.py` does it")


def test_nearly_every_architecture_is_built() -> None:
    assert len(architectures()) >= 160


def test_the_table_in_the_docs_says_what_was_measured(rows: dict[str, Examined]) -> None:
    """Stale rows fail, where the installed transformers is the one that the document names."""
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip(f"the page is of another transformers than {transformers.__version__}")
    assert [n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if f"| {n} |" not in text and f"- `{n}`" not in text] == []
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for name, row in rows.items():
        today, _, backend = (cell.strip() for cell in lines[name].split("|")[2:5])
        assert today == row.today
        assert backend.startswith("refused" if row.refusal else row.backend)
