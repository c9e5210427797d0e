"""`sft-plugins soften` in words and exit codes: what was measured, what is recommended, and what was written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import sft_plugins.collapse
from sft_plugins.collapse import DetectorConfig, ModeCollapseCallback, Softened, softening_page
from sft_plugins.collapse.detect.bootstrap import Estimate
from sft_plugins.collapse.softening.tradeoff import Place, Tradeoff
from testkit.browser import open_page
from testkit.commands import invoke
from testkit.watched_runs import OPTIONS, PROMPTS, byte_tokenizer, lora, rows, tiny_model, train


def place(share: float, kept: float, loss: float, level: str) -> Place:
    healthy = level in ("ok", "info")
    return Place(
        share=share, loss=Estimate(loss, loss - 0.1, loss + 0.1, 0.5, 16), loss_change=Estimate(0.02, 0.01, 0.03, 0.9, 16),
        diversity=Estimate(kept, kept - 0.1, kept + 0.1, 0.01, 20), reasoning=None, forks=Estimate(kept, kept, kept, 0, 16),
        level=level, codes=("narrowing",) if level != "ok" else (), evidence=("answers <b>narrow</b>",),
        healthy=healthy, within=True,
    )  # fmt: skip


def found(outcome: Any = "recommended") -> Softened:
    places = (place(1.0, 0.3, 1.2, "critical"), place(0.75, 0.55, 1.21, "warn"), place(0.5, 0.8, 1.22, "info"))
    tradeoff = Tradeoff(
        places=places, outcome=outcome, recommended=0.5 if outcome == "recommended" else None, reason="the reason",
        samples=({"prompt": "<script>x</script>", "answers": [{"share": 1.0, "texts": ["no", ""]}]},),
        bands=DetectorConfig(),
    )  # fmt: skip
    return Softened(
        tradeoff=tradeoff, run=Path("runs/a[bold]"), weights=Path("runs/a[bold]"), kind="adapter",
        output=Path("runs/a[bold]/softened"), check={"logits_error": 1e-7}, notes=("a note",), origin="the base",
    )  # fmt: skip


@pytest.mark.parametrize(("outcome", "code"), [("recommended", 0), ("as_trained", 0), ("none", 1), ("blind", 3)])
def test_the_exit_code_says_whether_there_is_a_share_to_take(
    outcome: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sft_plugins.collapse, "soften", lambda *_, **__: found(outcome))
    done = invoke("soften", tmp_path, "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ok"], told["tradeoff"]["outcome"]) == (code, code == 0, outcome)
    assert told["tradeoff"]["places"][0]["diversity"]["value"] == 0.3
    done = invoke("soften", tmp_path)
    words = " ".join(done.stdout.split())
    for expected in ("a[bold]", "The reason.", "30% (20%", "loaded again and checked: logits error 1.0e-07", "a note"):
        assert expected in words


def test_the_page_works_in_a_browser_light_and_dark(tmp_path: Path) -> None:
    path = tmp_path / "soften.html"
    path.write_text(softening_page(found()), encoding="utf-8")
    for dark, width in ((False, 1200), (True, 400)):
        page = open_page(path, dark=dark, width=width)
        assert (page.console, page.requests) == ([], [])
        assert page.width <= width
        assert page.dom.count("<svg") == 2
        for words in (
            "Take λ = 0.5",
            "<script>x</script>",
            "answers <b>narrow</b>".replace("a", "A", 1),
            "(empty)",
            "λ = 0.75",
        ):
            assert words in page.text
    blind = dataclasses.replace(
        found("blind"), tradeoff=dataclasses.replace(found("blind").tradeoff, places=(dataclasses.replace(
            place(1.0, 0.3, 1.2, "none"), loss=None, loss_change=None, diversity=None, forks=None),)), check=None, output=None,
    )  # fmt: skip
    assert "No recommendation" in softening_page(blind)
    assert "<svg" not in softening_page(blind), "nothing was measured, so nothing is drawn"


def test_a_run_is_softened_from_the_command_line(tmp_path: Path) -> None:
    """A watched LoRA run whose ruler is the base's hidden states, which a command can have again."""
    tiny_model(dropout=0.0, max_position_embeddings=1024).save_pretrained(tmp_path / "base")
    model = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    options = {**OPTIONS, "eval_pairs": rows(4, seed=9), "embedder": "model", "every_steps": 3, "max_new_tokens": 6}
    watch = ModeCollapseCallback(byte_tokenizer(), PROMPTS, output_dir=tmp_path / "run" / "collapse", **options)
    train(model, tmp_path / "run", callbacks=[watch], max_steps=3, save_strategy="steps", save_steps=3)
    byte_tokenizer().save_pretrained(tmp_path / "run" / "checkpoint-3")
    done = invoke(
        "soften", tmp_path / "run", "--at", "0.5", "--html", tmp_path / "page.html", "--device", "cpu", "--json"
    )
    told = json.loads(done.stdout)
    assert told["weights"].endswith("checkpoint-3"), "the latest checkpoint, where the folder has no adapter of its own"
    assert [place["share"] for place in told["tradeoff"]["places"]] == [1.0, 0.5]
    assert (tmp_path / "page.html").is_file()
    assert done.exit_code == {"recommended": 0, "as_trained": 0, "none": 1, "blind": 3}[told["tradeoff"]["outcome"]]


def test_what_cannot_be_softened_is_one_error(tmp_path: Path) -> None:
    for arguments, code in (
        ([tmp_path / "gone"], "no_run"),
        ([tmp_path, "--at", "a,b"], "bad_share"),
        ([tmp_path, "--at", "1.5"], "bad_share"),
    ):
        done = invoke("soften", *arguments, "--json")
        assert done.exit_code == 2
        assert json.loads(done.stdout)["error"]["code"] == code
        assert "Traceback" not in done.stderr
