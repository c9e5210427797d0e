"""Refusals and empty phrases, language by language: regular expressions, searched in an answer whose case is folded, whose
white space is single blanks and whose apostrophes are straight (`is_boilerplate`).

They are what an assistant says instead of an answer: "I'm sorry, but I can't help with that", "as a language model", "how can I
help you today". Where a language is not listed its refusals are not counted; `boilerplate=` takes patterns of one's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sft_plugins.collapse.metrics.diversity import normalise_text
from sft_plugins.errors import CollapseError

__all__ = ["BOILERPLATE", "BUILTIN", "LANGUAGES", "boilerplate_patterns", "is_boilerplate"]

BUILTIN = "builtin"

LANGUAGES: dict[str, tuple[str, ...]] = {
    "English": (
        r"\bas an? (ai|artificial intelligence|(large )?language model)\b",
        r"\bi('m| am) (just |only )?an? (ai|artificial intelligence|(large )?language model)\b",
        r"\bi('m| am) (sorry|afraid),? (but )?(i )?(can('t|not)|(am |'m )?(not able|unable))",
        r"^(i('m| am) )?sorry,? (but )?i (can('t|not)|am (not able|unable))",
        r"\bi (can('t|not)|am (not able|unable) to|won't) (help|assist|comply|provide|fulfil)",
        r"\bi('d| would) be happy to (help|assist)\b.{0,80}$",
        r"\bhow (can|may) i (help|assist) you( today)?\b",
    ),
    "German": (
        r"\bals (ki|künstliche intelligenz|(grosses )?sprachmodell)\b",
        r"\bich bin (nur |lediglich )?(eine? )?(ki|künstliche intelligenz|(grosses )?sprachmodell)\b",
        r"\b(tut mir|es tut mir|mir tut es) (sehr )?leid,? (aber |dass )?(ich|dabei|das|da|damit|dir|ihnen)\b.{0,60}\b"
        r"(nicht|kein\w*)\b",
        r"\bich kann (ihnen|dir|euch)? ?(dabei|damit|hierbei|bei dieser (anfrage|frage))\b.{0,20}\bnicht "
        r"(helfen|weiterhelfen|behilflich)",
        r"\b(leider )?(kann|darf) ich (ihnen|dir)? ?(dabei|damit|das)? ?(leider )?nicht "
        r"(helfen|weiterhelfen|beantworten|unterstützen)",
        r"\bwie kann ich (ihnen|dir|euch) (heute )?(helfen|weiterhelfen|behilflich sein)\b",
    ),
    "French": (
        r"\ben tant (qu'|que )(ia|intelligence artificielle|(grand )?modèle de langage|assistant)",
        r"\bje suis (seulement |juste )?une? (ia|intelligence artificielle|(grand )?modèle de langage)\b",
        r"\b(je suis |je m'excuse, ?)?(désolée?|navrée?),? (mais )?(je )?ne (peux|puis|suis)\b",
        r"\bje ne (peux|puis) (malheureusement )?pas (vous |t'|te )?(y )?(aider|répondre|assister|fournir)",
        r"\bcomment (puis-je|je peux) (vous |t')aider\b",
    ),
    "Spanish": (
        r"\bcomo (una? )?(ia|inteligencia artificial|modelo de lenguaje)\b",
        r"\bsoy (solo |sólo )?(una? )(ia|inteligencia artificial|modelo de lenguaje)\b",
        r"\b(lo siento|lo lamento|disculpa|disculpe|perdona|perdón)( mucho)?,? (pero )?(no )(puedo|podría|me es posible)",
        r"\bno puedo (ayudarte|ayudarle|ayudar con|asistirte|asistirle|proporcionar|responder a es)",
        r"\b(cómo|en qué) puedo (ayudarte|ayudarle|ayudar)\b",
    ),
    "Portuguese": (
        r"\bcomo (uma? )?(ia|inteligência artificial|modelo de linguagem)\b",
        r"\b(desculpe|desculpa|sinto muito|lamento),? (mas )?(eu )?não (posso|consigo)\b",
        r"\bnão posso (ajudar|ajudá-l[oa]|te ajudar|fornecer|responder a es)",
        r"\bcomo posso (ajudar|ajudá-l[oa]|te ajudar)\b",
    ),
    "Italian": (
        r"\b(come|in quanto) (un'|una? )?(ia|intelligenza artificiale|modello linguistico)\b",
        r"\b(mi dispiace|mi spiace|spiacente),? (ma )?non (posso|sono in grado)\b",
        r"\bnon posso (aiutarti|aiutarla|aiutare|fornire|rispondere a quest)",
        r"\bcome posso (aiutarti|aiutarla|esserti utile|esserle utile)\b",
    ),
    "Dutch": (
        r"\bals (een )?(ai|kunstmatige intelligentie|taalmodel)\b",
        r"\b(het spijt me|sorry),? (maar )?(ik kan|daar kan ik|daarmee kan ik)\b.{0,40}\bniet\b",
        r"\bik kan (je|u) (daar|hier)(mee|bij) (helaas )?niet helpen",
        r"\b(hoe|waarmee) kan ik (je|u) (vandaag )?(helpen|van dienst zijn)\b",
    ),
    "Polish": (
        r"\bjako (sztuczna inteligencja|model językowy|ai)\b",
        r"\b(przepraszam|przykro mi),? (ale )?nie mogę\b",
        r"\bnie mogę (ci |panu |pani )?(w tym )?pomóc\b",
        r"\bw czym mogę (ci |panu |pani )?(dziś |dzisiaj )?pomóc\b",
    ),
    "Russian": (
        r"\bкак (искусственный интеллект|языковая модель|ии)\b",
        r"\bя (всего лишь |только |просто )?(искусственный интеллект|языковая модель)\b",
        r"\b(извините|простите|к сожалению|сожалею),? (но )?я не (могу|смогу|в состоянии)\b",
        r"\bя не могу (вам |тебе )?(с этим |в этом )?помочь\b",
        r"\b(чем|как) (я )?могу (вам |тебе )?помочь\b",
    ),
    "Turkish": (
        r"\bbir (yapay zeka|dil modeli)( olarak|yim)\b",
        r"\b(üzgünüm|maalesef|özür dilerim),? (ama |ancak |fakat )?(bu konuda |buna )?(size |sana )?"
        r"(yardımcı olamam|yardım edemem)",
        r"\b(size|sana) (bugün )?nasıl yardımcı olabilirim\b",
    ),
    "Arabic": (
        r"(بصفتي|كوني|باعتباري) (نموذج|نموذجا|نموذجًا|ذكاء)",
        r"(آسف|أعتذر|عذرا|عذرًا|عذراً|للأسف)،? ?(و?لكن(ني|ي)? |ف?أنا )?(لا (أستطيع|يمكنني)|لست قادر)",
        r"(لا (أستطيع|يمكنني)) (مساعدتك|المساعدة)",
        r"كيف (يمكنني|أستطيع) مساعدتك",
    ),
    "Hindi": (
        r"(एक )?(एआई|कृत्रिम बुद्धिमत्ता|भाषा मॉडल) (होने के नाते|के रूप में|के तौर पर)",
        r"(क्षमा करें|माफ़ करें|माफ करें|मुझे खेद है|मुझे अफ़सोस है|खेद है)[,।]? ?(लेकिन |पर |कि )?(मैं )?.{0,40}(नहीं कर सकत|मदद नहीं|असमर्थ)",
        r"मैं (इसमें |इस में |आपकी )+.{0,20}(मदद|सहायता) नहीं कर सकत",
        r"मैं आपकी (कैसे |क्या |किस प्रकार )+(मदद|सहायता) कर सकत",
    ),
    "Chinese": (
        r"(作为|我(只)?是)(一个|一名|一款)?(人工智能|ai|大型?语言模型|语言模型)",
        r"(抱歉|对不起|很遗憾|不好意思)[,,。!! ]*(但|但是)?(我)?(无法|不能|没办法|没有办法)",
        r"我(无法|不能)(为您|为你|帮您|帮你|协助|帮助|提供|回答)",
        r"(請問|请问)?(我|有什么)(可以|能)(为您|为你|帮您|帮你|帮到您|帮助您|帮助你)(做些?什么|的(吗|嗎)|服务)",
        r"(作為|我(只)?是)(一個|一名)?(人工智慧|大型?語言模型|語言模型)",
        r"(抱歉|對不起|很遺憾)[,,。! ]*(但|但是)?(我)?(無法|不能)",
    ),
    "Japanese": (
        r"(ai|人工知能|言語モデル)(として|です|であり|なので)",
        r"(申し訳(ありません|ございません)|すみません|残念ながら).{0,30}(できません|できかねます|お答えできません|お手伝いできません)",
        r"(どのように|何か|何を|なにか)(お手伝い|お役に立て)(でき|る|できること)",
    ),
    "Korean": (
        r"(인공지능|ai|언어 모델)(으로서|로서|이기 때문에|입니다|이므로)",
        r"(죄송(합니다|하지만)|미안하지만|안타깝지만).{0,40}(수 없|어렵|불가능)",
        r"(무엇을|어떻게) 도와(드릴까요|드릴 수)",
    ),
    "Vietnamese": (
        r"\b(là|với tư cách là) (một )?(mô hình ngôn ngữ|trí tuệ nhân tạo|ai)\b",
        r"\b(xin lỗi|rất tiếc),? (nhưng )?(tôi|mình) (không thể|không)\b.{0,20}\b(giúp|hỗ trợ|trả lời|cung cấp)",
        r"\b(tôi|mình) có thể giúp gì cho (bạn|anh|chị)\b",
    ),
}

BOILERPLATE: tuple[str, ...] = tuple(pattern for patterns in LANGUAGES.values() for pattern in patterns)


def boilerplate_patterns(given: Iterable[str]) -> tuple[str, ...]:
    """`given` with the word `builtin` replaced by the patterns above: `["builtin", r"\\bno comment\\b"]` adds one.

    Raises:
        CollapseError: `bad_option`, for a pattern that is none.
    """
    if isinstance(given, str):
        given = [given]
    patterns: list[str] = []
    for pattern in given:
        if pattern == BUILTIN:
            patterns += BOILERPLATE
            continue
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise CollapseError(
                f"boilerplate holds {pattern!r}, which is no regular expression: {error}",
                code="bad_option",
                remedy="correct it, or escape what is meant as it stands; the word 'builtin' stands for the patterns built in",
            ) from error
        patterns.append(pattern)
    return tuple(patterns)


def is_boilerplate(text: str, patterns: Iterable[re.Pattern[str]]) -> bool:
    """Whether an answer is empty or matches any of `patterns`."""
    text = normalise_text(text).replace("’", "'")
    return not text or any(pattern.search(text) for pattern in patterns)
