"""C18 of `docs/known-failures.md`: refusals are counted in every language that is listed."""

from __future__ import annotations

import pytest

from sft_plugins.collapse.metrics.refusals import BOILERPLATE, LANGUAGES, boilerplate_patterns, is_boilerplate
from sft_plugins.errors import CollapseError
from testkit.languages import TEXTS

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
