"""Slow and obviously right: does a masked row hold the four invariants, and if a row was refused, was there a reason?

Written from the contract alone, with nothing but `apply_chat_template`, `tokenizer.__call__` and `decode`. For every
supervised turn k:

0. Mode          of the generation prompts that the template's switches give, the one that the rendered turn goes on from;
                 of several the longest; where none, the prompt and the message's own text behind it (continuation)
1. Parity        ids before the run == apply_chat_template(messages[:k], add_generation_prompt=True, tokenize=True)
2. Coverage      the run decodes to what the template renders for the turn, from there to a stop token, and holds the
                 content, reasoning and tool calls of the data verbatim but for whitespace at their ends
3. Stop          the last id of the run stops generation; after it the template adds whitespace and special tokens only
4. Nothing else  every label is -100 or its id, the first is -100, every trainable turn is supervised exactly once

`violations` returns what is wrong with rows that were made, `refusals` which error codes would be justified.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

IGNORE = -100

# The codes that the contract names, and two that are sharper than its `bad_schema`: what a template raises itself, and a
# conversation that begins with the assistant. An error with another one is a fault.
CODES = frozenset(
    {
        "bad_schema",
        "boundary",
        "content_lost",
        "double_bos",
        "empty_response",
        "history_rewrite",
        "id_out_of_range",
        "length_mismatch",
        "missing_stop",
        "no_prompt",
        "no_supervised_tokens",
        "overflow",
        "render_mismatch",
        "special_token_in_content",
        "template_error",
    }
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What generation would be given before message `index`, and what it should then produce.

    `responses` are the texts that may be supervised: each ends with a stop token and leaves only whitespace and special
    tokens of the rendering behind. Empty when the turn cannot be exact; `codes` then says why. `borrowed` marks a stop
    that the next message's header brings (GLM), which a masker may take or refuse.
    """

    index: int
    prompt_ids: tuple[int, ...] = ()
    prompt: str = ""
    responses: tuple[str, ...] = ()
    borrowed: bool = False
    codes: frozenset[str] = frozenset()
    why: str = ""
    mode: tuple[tuple[str, Any], ...] = ()
    continued: bool = False


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """`codes`: what a refusal of the row may carry. `must`: no row may be made of it. No codes: it has to be exact."""

    codes: frozenset[str] = frozenset()
    must: bool = False
    why: tuple[str, ...] = field(default=())


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def render(tokenizer: Any, messages: list[dict[str, Any]], row: dict[str, Any], *, generation: bool) -> str:
    # A batch of one, because transformers looks at conversation[0], which an empty prompt does not have.
    return str(
        tokenizer.apply_chat_template(
            [messages], tools=row.get("tools") or None, tokenize=False, add_generation_prompt=generation,
            **(row.get("chat_template_kwargs") or {}),
        )[0]
    )  # fmt: skip


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]], row: dict[str, Any]) -> tuple[int, ...]:
    """The ids that `model.generate` would be given."""
    ids = tokenizer.apply_chat_template(
        [messages], tools=row.get("tools") or None, tokenize=True, add_generation_prompt=True, return_dict=False,
        **(row.get("chat_template_kwargs") or {}),
    )[0]  # fmt: skip
    return tuple(int(i) for i in ids)


# ---------------------------------------------------------------------------------------------------------------------
# What a turn holds
# ---------------------------------------------------------------------------------------------------------------------


def text_of(content: Any) -> str:
    """The text of a message's content: a string, text parts, or None."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def pieces(message: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """(what, spellings) of everything in the data that the supervised text must hold in one of its spellings."""
    found: list[tuple[str, tuple[str, ...]]] = []
    content = text_of(message.get("content"))
    inline = re.fullmatch(r"\s*(?:<think>)?(.*?)</think>(.*)", content, flags=re.DOTALL)
    if inline:  # templates re-render the tags with their own whitespace, or put the opening one into the prompt
        found += [("inline reasoning", (inline[1].strip(),)), ("content", (inline[2].strip(),))]
    else:
        found.append(("content", (content.strip(),)))
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(key), str):
            found.append((key, (message[key].strip(),)))
    for item in message.get("tool_calls") or []:
        function = item.get("function") or item
        found.append(("tool name", (function["name"],)))
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                found.append(("tool arguments", (arguments,)))
                continue
        for path, value in _leaves(arguments or {}):
            found += [("tool argument name", (str(step),)) for step in path if isinstance(step, str)]
            ascii_, utf8 = json.dumps(value), json.dumps(value, ensure_ascii=False)
            spellings = [str(value), ascii_, utf8, json.dumps(ascii_)[1:-1]]
            if isinstance(value, str):
                spellings.append(utf8[1:-1])
            found.append(("tool argument", tuple(spellings)))
    return [(what, spellings) for what, spellings in found if spellings[0]]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterable[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value


def missing_pieces(message: dict[str, Any], text: str) -> list[str]:
    return [what for what, spellings in pieces(message) if not any(s in text for s in spellings)]


def is_empty(message: dict[str, Any]) -> bool:
    return not pieces(message)


def forged_tokens(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """Special tokens spelled out in the data: they would become real ones."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    strings = [s for message in row["messages"] for s in _strings({k: v for k, v in message.items() if k != "role"})]
    strings += list(_strings(row.get("tools") or []))
    return sorted({token for token in special for s in strings if token in s})


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


# ---------------------------------------------------------------------------------------------------------------------
# Which turns, and what each should look like
# ---------------------------------------------------------------------------------------------------------------------


def trainable(messages: Sequence[dict[str, Any]], train_on: str = "all") -> list[int]:
    """Indices of the assistant messages that carry loss: not those with weight 0 or train False."""
    indices = [
        i for i, m in enumerate(messages)
        if m["role"] == "assistant" and m.get("weight") in (None, 1, 1.0) and m.get("train") in (None, True)
    ]  # fmt: skip
    indices = indices[-1:] if train_on == "last" else indices
    # An assistant that opens the conversation is context: nothing prompts it.
    return indices[1:] if indices[:1] == [0] and len(indices) > 1 else indices


# ---------------------------------------------------------------------------------------------------------------------
# Modes of a template, and turns that it does not render after their prompt
# ---------------------------------------------------------------------------------------------------------------------

SWITCHES = ("enable_thinking", "thinking")
_OPEN, _CLOSED = re.compile(r"<think>\s*$"), re.compile(r"</think>\s*$")


def modes(tokenizer: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Values of the template's switches to try, none of them first; the user's own decide alone."""
    template = tokenizer.get_chat_template(None, row.get("tools") or None)
    names = [name for name in SWITCHES if re.search(rf"\b{name}\b", template)]
    if any(name in (row.get("chat_template_kwargs") or {}) for name in names):
        return [{}]
    return [{}, *({name: value} for name in names for value in (False, True))]


def in_mode(row: dict[str, Any], mode: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chat_template_kwargs": {**(row.get("chat_template_kwargs") or {}), **mode}} if mode else row


def thoughts(message: dict[str, Any]) -> str:
    """The reasoning of a message, inline or under a key, or ""."""
    return "".join(spellings[0] for what, spellings in pieces(message) if what in _REASONING)


_REASONING = ("inline reasoning", "reasoning_content", "reasoning", "thinking")


def chosen_mode(tokenizer: Any, row: dict[str, Any], k: int) -> tuple[dict[str, Any], str | None]:
    """The mode that turn `k` belongs to, and its own text where its rendering goes on from no prompt of the template."""
    messages, message = row["messages"], row["messages"][k]
    found: list[tuple[bool, int, dict[str, Any]]] = []
    own: list[tuple[bool, dict[str, Any], str]] = []
    rewritten: list[tuple[int, dict[str, Any], str]] = []
    for mode in modes(tokenizer, row):
        switched = in_mode(row, mode)
        try:
            prompt = render(tokenizer, messages[:k], switched, generation=True)
            full = render(tokenizer, messages[: k + 1], switched, generation=False)
        except Exception:
            if not mode:
                raise
            continue
        wrong_kind = bool(_CLOSED.search(prompt)) if thoughts(message) else bool(_OPEN.search(prompt))
        text = own_text(prompt, full, message)
        if text is not None:
            own.append((wrong_kind, mode, text))
        if not full.startswith(prompt):
            told = None if wrong_kind else rewritten_text(tokenizer, switched, k, prompt, full)
            if told is not None:
                history = render(tokenizer, messages[:k], switched, generation=False)
                rewritten.append((len(history) - len(prompt), mode, told))
            continue
        if any(what in _REASONING for what in missing_pieces(message, full[len(prompt) :])):
            continue
        try:
            header = len(prompt) - len(render(tokenizer, messages[:k], switched, generation=False))
        except Exception:
            header = 0
        found.append((wrong_kind, -header, mode))
    if found:
        return min(found, key=lambda one: one[:2])[2], None
    if own:
        return min(own, key=lambda one: one[0])[1:]
    return min(rewritten, key=lambda one: one[0])[1:] if rewritten else ({}, None)


def rewritten_text(tokenizer: Any, row: dict[str, Any], k: int, prompt: str, full: str) -> str | None:
    """What the template writes for turn `k` where it renders the history before it otherwise than the prompt does.

    It stands behind the last text of another message: after the header of the generation prompt, or, where an answer or a
    result went before and the template goes on without one, from the turn's own text on.
    """
    messages = row["messages"]
    others = []
    for j in range(k):
        new = copy.deepcopy(messages[: k + 1])
        if not _marked(new[j]):
            return None
        others.append(render(tokenizer, new, row, generation=False))
    new = copy.deepcopy(messages[: k + 1])
    _marked(new[k], front=True)
    with_mark = render(tokenizer, new, row, generation=False)
    start = with_mark.find(_MARK)
    if start < 0 or with_mark.replace(_MARK, "", 1) != full:
        return None
    earlier = 0
    for text in others:
        behind = len(text) - text.rfind(_MARK) - len(_MARK) if _MARK in text else None
        # Texts of others that the template puts behind the turn's own are no history.
        if behind is not None and text.replace(_MARK, "", 1) == full and len(full) - behind <= start:
            earlier = max(earlier, len(full) - behind)
    between = full[earlier:start]
    history = render(tokenizer, messages[:k], row, generation=False)
    header = prompt[len(history) :] if prompt.startswith(history) else ""
    text = None
    if header and header in between:
        text = full[earlier + between.rindex(header) + len(header) :]
    elif messages[k - 1]["role"] in ("assistant", "tool") and messages[k].get("tool_calls"):
        text = call_behind(tokenizer, row, k, full, history)
    elif messages[k - 1]["role"] in ("assistant", "tool") and (
        not between.strip() or (full.startswith(history) and not full[len(history) : start].strip())
    ):
        text = full[start:]
    if text is None or any(what in _REASONING for what in missing_pieces(messages[k], text)):
        return None
    return text


def call_behind(tokenizer: Any, row: dict[str, Any], k: int, full: str, history: str) -> str | None:
    """The call at `k` as the template writes it behind `history`, if it writes it so behind a question as well."""
    messages = row["messages"]
    question = [j for j in range(k) if messages[j]["role"] == "user"][-1:]
    if not question or not full.startswith(history):
        return None
    asked = messages[: question[0] + 1]
    prompt = render(tokenizer, asked, row, generation=True)
    alone = render(tokenizer, [*asked, messages[k]], row, generation=False)
    if not alone.startswith(prompt) or not alone[len(prompt) :].strip():
        return None
    called, behind = alone[len(prompt) :], full[len(history) :]
    return behind if behind.startswith(called) or called.startswith(behind) else None


def _marked(message: dict[str, Any], *, front: bool = False) -> bool:
    """Puts a mark into the message: behind its text or its call's name, or in front of what it says first."""

    def mark(text: str) -> str:
        bare = text.lstrip() if front else text.rstrip()
        return text[: len(text) - len(bare)] + _MARK + bare if front else bare + _MARK + text[len(bare) :]

    keys = [key for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)]
    calls = message.get("tool_calls") or []
    said = message.get("content")
    if front and keys:
        message[keys[0]] = mark(message[keys[0]])
    elif text_of(said).strip():
        if isinstance(said, str):
            message["content"] = mark(said)
        else:
            at = 0 if front else -1
            said[at]["text"] = mark(said[at]["text"])
    elif calls:
        function = calls[-1].get("function") or calls[-1]
        function["name"] = mark(function["name"])
    else:
        return False
    return True


def own_text(prompt: str, full: str, message: dict[str, Any]) -> str | None:
    """What generation has to emit after `prompt` where the template does not render it there; None where nothing may.

    A prompt that opens a thought is followed by the message's reasoning, one that closes it by its answer alone.
    """
    same = 0
    while same < min(len(prompt), len(full)) and prompt[same] == full[same]:
        same += 1
    for tag in re.finditer(r"</?think>", prompt):  # a tag that the two part in is the prompt's, whole
        if tag.start() < same < tag.end():
            same = tag.start()
    rest = full[same:]
    if re.sub(r"</?think>|\s", "", prompt[same:]):
        return None
    thought = thoughts(message)
    if _CLOSED.search(prompt) and not thought and prompt[same:]:
        return rest
    content = text_of(message.get("content"))
    inline = re.fullmatch(r"\s*(?:<think>)?(.*?)</think>(.*)", content, flags=re.DOTALL)
    if not thought or _CLOSED.search(prompt):
        return None
    answer = (inline[2] if inline else content).strip()
    before, found, behind = rest.partition(answer) if answer else ("", "", rest.lstrip())
    if before.strip():
        return None
    if _OPEN.search(prompt):
        space = prompt[len(prompt.rstrip()) :]
        if inline and not any(isinstance(message.get(key), str) for key in _REASONING[1:]):
            gap = inline[2][: len(inline[2]) - len(inline[2].lstrip())]
            return inline[1].lstrip() + "</think>" + gap + found + behind
        return thought + space + "</think>" + 2 * space + found + behind
    if inline and not prompt[same:]:
        return content.lstrip() + behind if content.lstrip().startswith("<think>") else None
    return None


def turn(tokenizer: Any, row: dict[str, Any], k: int, stop_ids: set[int]) -> Turn:
    messages, message = row["messages"], row["messages"][k]
    try:
        mode, own = chosen_mode(tokenizer, row, k)
        row = in_mode(row, mode)
        prompt = render(tokenizer, messages[:k], row, generation=True)
        full = render(tokenizer, messages[: k + 1], row, generation=False)
        ids = prompt_ids(tokenizer, messages[:k], row)
    except (
        Exception
    ) as error:  # whatever a template throws: the row cannot be rendered, so nothing can be generated from it
        why = f"turn {k}: the template raises {type(error).__name__}: {error}"
        return Turn(index=k, codes=frozenset({"template_error", "bad_schema"}), why=why)
    if own is not None:
        full = prompt + own
    lost = missing_pieces(message, full[len(prompt) :] if full.startswith(prompt) else full)
    lost += printed_values(messages[: k + 1], full) + lost_before(tokenizer, row, k)
    if not full.startswith(prompt):
        codes = {"render_mismatch", *({"content_lost"} if lost else ())}
        why = f"turn {k}: rendered turn does not continue the generation prompt …{prompt[-40:]!r}"
        return Turn(index=k, codes=frozenset(codes), why=why)
    rest = full[len(prompt) :]
    special = [*map(str, tokenizer.all_special_tokens), *map(str, tokenizer.added_tokens_decoder.values())]
    glue = re.compile("(?:" + "|".join([r"\s", *map(re.escape, sorted(special, key=len, reverse=True))]) + ")*")
    responses = []
    for stop in {str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids}:
        for match in re.finditer(re.escape(stop), rest):
            if glue.fullmatch(rest, match.end()) and not missing_pieces(message, rest[: match.end()]):
                responses.append(rest[: match.end()])
    borrowed = "" if responses or lost else next_header_stop(tokenizer, row, k, full, stop_ids)
    if borrowed:
        responses.append(rest + borrowed)
    codes = set()
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == (bos, bos):
        codes.add("double_bos")
    if lost:
        codes.add("content_lost")
    if not responses and (not lost or not any(str(tokenizer.convert_ids_to_tokens(i)) in rest for i in stop_ids)):
        codes.add("missing_stop")
    if codes:
        if not any(continuation(tokenizer, ids, option) == rest for option in tokenisations(tokenizer, rest)):
            codes.add("boundary")  # a masker may notice this first
        return Turn(index=k, codes=frozenset(codes), why=f"turn {k}: {sorted(codes)} {lost} in {rest[-80:]!r}")
    ordered = tuple(sorted(set(responses), key=len))
    return Turn(
        index=k, prompt=prompt, prompt_ids=ids, responses=ordered, borrowed=bool(borrowed),
        mode=tuple(mode.items()), continued=own is not None,
    )  # fmt: skip


def next_header_stop(tokenizer: Any, row: dict[str, Any], k: int, full: str, stop_ids: set[int]) -> str:
    """The stop token that opens whatever the template renders after message `k`, or ""."""
    messages = row["messages"]
    # The header is looked up in a conversation of its own too: a later message may rewrite the turn's rendering.
    probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Zanswerq"}]
    following = messages[k + 1 : k + 2] or [
        {"role": "tool" if messages[k].get("tool_calls") else "user", "content": "z"}
    ]
    try:
        longer = render(tokenizer, messages[: k + 1] + following, row, generation=False)
        if not longer.startswith(full):
            full = render(tokenizer, probe, row, generation=False).rpartition("Zanswerq")[2]
            longer = render(tokenizer, probe + following, row, generation=False).rpartition("Zanswerq")[2]
    except Exception:  # nothing can follow: nothing to borrow
        return ""
    if not longer.startswith(full):
        return ""
    stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids]
    return next((stop for stop in stops if longer.startswith(stop, len(full))), "")


def continuation(tokenizer: Any, before: Sequence[int], after: Sequence[int]) -> str | None:
    """The text that `after` adds behind `before`; None where decoding it changes the text before."""
    base, joined = decode(tokenizer, before), decode(tokenizer, [*before, *after])
    return joined[len(base) :] if joined.startswith(base) else None


def tokenisations(tokenizer: Any, text: str) -> list[list[int]]:
    """Obvious ways to tokenise a text that goes on where another ends, without special tokens added.

    The text by itself, and the text behind an anchor (an added token, a newline, a colon) whose ids are cut off again,
    which keeps tokenizers that write `▁` before the first word from doing so.
    """
    added = str(tokenizer.convert_ids_to_tokens(next(iter(tokenizer.added_tokens_decoder))))
    found = [list(tokenizer(text, add_special_tokens=False)["input_ids"])]
    for anchor in (added, "\n", ":"):
        front = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if whole[: len(front)] == front:
            found.append(whole[len(front) :])
    return found


def tokenizable(tokenizer: Any, expected: Turn) -> bool:
    """Whether an obvious tokenisation of the response joins the prompt without changing a character."""
    return any(
        continuation(tokenizer, expected.prompt_ids, ids) == text
        for text in expected.responses
        for ids in tokenisations(tokenizer, text)
    )


def variants(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Readings of the row that the contract leaves open; a row is exact if it is exact under one of them.

    Keys holding None are dropped everywhere (columnar typing fills them in). A None content beside tool calls may reach
    the template as None, as "" or not at all; tool arguments may be a mapping or JSON text, text a string or one part.
    """
    has_none = any(m.get("content") is None for m in row["messages"])
    has_calls = any(m.get("tool_calls") for m in row["messages"])
    roles = ("system", "developer", "user", "assistant", "tool")
    texts: list[Any] = [None, (), roles, ("user",), roles[2:]]  # None: as it is; else the roles that speak in parts
    for parts, content, arguments in itertools.product(
        texts, ["keep", "drop", "empty"][: 3 if has_none else 1], ["keep", "mapping", "text"][: 3 if has_calls else 1]
    ):
        new = {k: _without_none(v) if k in ("tools", "chat_template_kwargs") else v for k, v in row.items()}
        new["messages"] = [_variant(m, content, arguments, parts) for m in row["messages"]]
        yield new


def _variant(message: dict[str, Any], content: str, arguments: str, parts: Any) -> dict[str, Any]:
    new = _without_none(copy.deepcopy(message))
    if message.get("content") is None:
        empty = [{"type": "text", "text": ""}] if message["role"] in (parts or ()) else ""
        kept = {"content": None} if "content" in message else {}
        new.update({"keep": kept, "drop": {}, "empty": {"content": empty}}[content])
    elif parts is not None:
        text = text_of(message["content"])
        new["content"] = [{"type": "text", "text": text}] if message["role"] in parts else text
    for item in new.get("tool_calls") or []:
        function = item.get("function") or item
        given = function.get("arguments")
        if arguments == "mapping" and isinstance(given, str):
            function["arguments"] = json.loads(given or "{}")
        if arguments == "text" and isinstance(given, dict):
            function["arguments"] = json.dumps(given, ensure_ascii=False)
    return new


def printed_values(messages: list[dict[str, Any]], text: str) -> list[str]:
    """Values that the template printed as Python or JSON prints them, where it should have rendered what is in them."""
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(p in text for p in (str(content), json.dumps(content))):
            found.append("content printed as a list")
        for item in message.get("tool_calls") or []:
            given = (item.get("function") or item).get("arguments")
            if isinstance(given, dict) and given and str(given) in text and str(given) != json.dumps(given):
                found.append("arguments printed as Python prints them")
            if isinstance(given, str) and (('"' in given and json.dumps(given) in text) or "{" + given + "}" in text):
                found.append("arguments encoded twice")
            if given == "" and not re.search(r"\{\s*\}", text):
                found.append("arguments left blank")
    return found


_MARK = "Zoraclemarkq"


def lost_before(tokenizer: Any, row: dict[str, Any], k: int) -> list[str]:
    """What is in no prompt of turn `k`: altered, it does not alter the prompt. Earlier reasoning may be left out."""

    def altered(change: Any) -> bool:
        new = copy.deepcopy(row)
        if change(new) is False:
            return True
        return _MARK in render(tokenizer, new["messages"][:k], new, generation=True)

    def content(j: int) -> Any:
        def change(new: dict[str, Any]) -> Any:
            said = new["messages"][j].get("content")
            if not text_of(said).strip():
                return False
            if isinstance(said, str):
                new["messages"][j]["content"] = said.rstrip() + _MARK
            else:
                said[-1]["text"] = said[-1]["text"].rstrip() + _MARK
            return True

        return change

    def call_name(j: int, n: int) -> Any:
        def change(new: dict[str, Any]) -> None:
            item = new["messages"][j]["tool_calls"][n]
            (item.get("function") or item)["name"] += _MARK

        return change

    def description(n: int) -> Any:
        def change(new: dict[str, Any]) -> Any:
            function = new["tools"][n].get("function") or new["tools"][n]
            if not function.get("description"):
                return False
            function["description"] += _MARK
            return True

        return change

    changes = [(f"message {j}", content(j)) for j in range(k)]
    changes += [
        (f"call {n} of message {j}", call_name(j, n))
        for j in range(k)
        for n in range(len(row["messages"][j].get("tool_calls") or []))
    ]
    changes += [(f"tool {n}", description(n)) for n in range(len(row.get("tools") or []))]
    try:
        return [f"{what} is in no prompt" for what, change in changes if not altered(change)]
    except Exception as error:  # a template that refuses the altered row has looked at what was altered
        return [] if _MARK in str(error) else [f"cannot be shown: {error}"]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]  # a list has no holes for columnar storage to fill
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What a row means under options that say how it is to be read
# ---------------------------------------------------------------------------------------------------------------------

_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool", "ipython": "tool", "function": "tool"}


def meant(
    tokenizer: Any,
    row: dict[str, Any],
    *,
    stop_ids: set[int],
    roles: dict[str, str] | None = None,
    reasoning: str = "raise",
) -> dict[str, Any]:
    """The row that `row` means: its speakers under the templates' names, and, where the template does not render the
    reasoning of a turn, that put in front of the answers (`inline`) or left out (`drop`)."""
    row = copy.deepcopy(row)
    for message in row["messages"]:
        name = message["role"]
        message["role"] = (roles or {}).get(name) or _NAMES.get(name, name)
    if reasoning == "raise" or not refusals(tokenizer, row, stop_ids=stop_ids).codes:
        return row
    for message in row["messages"]:
        kept = {key: value for key, value in message.items() if key not in _REASONING[1:]}
        if kept == message:
            continue
        if reasoning == "inline":
            thought = thoughts({key: value for key, value in message.items() if key not in ("content", "tool_calls")})
            text = f"<think>\n{thought}\n</think>\n\n{text_of(message.get('content'))}"
            kept["content"] = [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text
        message.clear()
        message.update(kept)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The two questions
# ---------------------------------------------------------------------------------------------------------------------


def refusals(tokenizer: Any, row: dict[str, Any], *, stop_ids: set[int], train_on: str = "all") -> Refusals:
    """Which codes justify refusing `row`, and whether a row may be made of it at all."""
    found = []
    for variant in variants(row):
        found.append(_refusals(tokenizer, variant, stop_ids, train_on))
        if not found[-1].codes:
            return Refusals()
    return Refusals(
        codes=frozenset().union(*(one.codes for one in found)),
        must=all(one.must for one in found),
        why=tuple(dict.fromkeys(why for one in found for why in one.why)),
    )


def _refusals(tokenizer: Any, row: dict[str, Any], stop_ids: set[int], train_on: str) -> Refusals:
    codes: set[str] = set()
    why: list[str] = []
    must = False
    forged = forged_tokens(tokenizer, row)
    if forged:
        codes.add("special_token_in_content")
        why.append(f"special tokens in the data: {forged}")
        must = True
    turns = trainable(row["messages"], train_on)
    if not turns:
        return Refusals(
            codes=frozenset({*codes, "no_supervised_tokens", "bad_schema"}), must=True, why=("no turn to train",)
        )
    for k in turns:
        message = row["messages"][k]
        if message.get("content") is None and not message.get("tool_calls"):
            codes.add("bad_schema")
            why.append(f"turn {k}: neither content nor tool calls")
        if is_empty(message):  # a supervised stop token or a refusal, both are fine
            codes.add("empty_response")
            why.append(f"turn {k}: empty")
        if k == 0:  # nothing precedes it: some templates render that, transformers' own entry point does not
            codes.add("no_prompt")
            why.append("turn 0 has no prompt")
        expected = turn(tokenizer, row, k, stop_ids)
        if expected.codes:
            codes |= expected.codes
            why.append(expected.why)
            must = True
            continue
        if not tokenizable(tokenizer, expected):
            codes |= {"boundary"}
            why.append(f"turn {k}: the tokenizer does not give {expected.responses[0][-60:]!r} back")
    return Refusals(codes=frozenset(codes), must=must, why=tuple(why))


def violations(
    tokenizer: Any, row: dict[str, Any], examples: Sequence[Any], *, stop_ids: set[int], train_on: str = "all"
) -> list[str]:
    """What is wrong with the rows made of `row`; empty when they hold the four invariants."""
    found = []
    for variant in variants(row):
        found.append(_violations(tokenizer, variant, examples, stop_ids, train_on))
        if not found[-1]:
            break
    return min(found, key=len)


def _violations(
    tokenizer: Any, row: dict[str, Any], examples: Sequence[Any], stop_ids: set[int], train_on: str
) -> list[str]:
    faults = []
    forged = forged_tokens(tokenizer, row)
    if forged:
        faults.append(f"nothing else: special tokens {forged} in the data were let through")
    wanted = [turn(tokenizer, row, k, stop_ids) for k in trainable(row["messages"], train_on)]
    faults += [f"must be refused: {one.why}" for one in wanted if one.codes]
    seen = {one.index: 0 for one in wanted}
    for number, example in enumerate(examples):
        ids, labels = [int(i) for i in example.input_ids], [int(i) for i in example.labels]
        faults += [f"row {number}: {fault}" for fault in structure(tokenizer, ids, labels)]
        if len(ids) == len(labels):
            faults += [f"row {number}: {f}" for f in _check_row(tokenizer, row, ids, labels, wanted, seen, stop_ids)]
    for index, count in seen.items():
        if count != 1:
            faults.append(f"nothing else: turn {index} is supervised {count} times")
    return faults


def structure(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[str]:
    """Invariant 4 as far as ids and labels alone show it."""
    faults = []
    if len(ids) != len(labels):
        return [f"nothing else: {len(ids)} ids, {len(labels)} labels"]
    if not ids:
        return ["nothing else: empty row"]
    if labels[0] != IGNORE:
        faults.append("nothing else: the first label is supervised")
    wrong = [i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, IGNORE)]
    if wrong:
        faults.append(f"nothing else: labels differ from ids at {wrong[:5]}")
    if all(label == IGNORE for label in labels):
        faults.append("nothing else: no token is supervised")
    if any(not 0 <= i < len(tokenizer) for i in ids):
        faults.append("nothing else: id out of range")
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        faults.append("parity: two BOS tokens")
    return faults


def runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal supervised spans: labels -100 -100 7 8 -100 9 -> (2, 4), (5, 6)."""
    edges = [i for i in range(len(labels) + 1)
             if (i < len(labels) and labels[i] != IGNORE) != (i > 0 and labels[i - 1] != IGNORE)]  # fmt: skip
    return list(zip(edges[::2], edges[1::2], strict=True))


def _check_row(
    tokenizer: Any, row: dict[str, Any], ids: list[int], labels: list[int], wanted: list[Turn],
    seen: dict[int, int], stop_ids: set[int],
) -> list[str]:  # fmt: skip
    faults = []
    end = 0
    for start, stop in runs(labels):
        at = start
        while at < stop:  # two turns may touch, where a template puts nothing between them
            here = [one for one in wanted if one.responses and list(one.prompt_ids) == ids[:at]]
            if not here and at > start:
                faults.append(f"stop: supervised on behind the stop token: {decode(tokenizer, ids[at:stop])!r}")
                break
            if not here:
                faults.append(
                    f"parity: supervised ids {at}:{stop} ({decode(tokenizer, ids[at:stop])[:60]!r}) do not start where "
                    f"generation of a trainable turn would; before: …{decode(tokenizer, ids[:at])[-60:]!r}"
                )
                break
            expected = here[0]
            ends = [
                e for e in range(at + 1, stop + 1)
                if ids[e - 1] in stop_ids and continuation(tokenizer, ids[:at], ids[at:e]) in expected.responses
            ]  # fmt: skip
            if not ends:
                if ids[stop - 1] not in stop_ids:
                    faults.append(f"stop: turn {expected.index} ends on {decode(tokenizer, ids[stop - 1 : stop])!r}")
                faults.append(
                    f"coverage: turn {expected.index} is {continuation(tokenizer, ids[:at], ids[at:stop])!r}, "
                    f"expected {expected.responses}"
                )
                break
            seen[expected.index] += 1
            at = ends[-1]
        end = stop
    tail = continuation(tokenizer, ids[:end], ids[end:])
    if end and end < len(ids) and not _belongs(tokenizer, row, decode(tokenizer, ids)):
        faults.append(f"nothing else: text behind the last turn is not the template's: {tail!r}")
    return faults


def _belongs(tokenizer: Any, row: dict[str, Any], text: str) -> bool:
    """Whether `text` opens a rendering of the conversation (decoding may drop the very first space)."""
    messages = row["messages"]
    for k, mode in itertools.product(range(len(messages), 0, -1), modes(tokenizer, row)):
        for generation in (False, True):
            try:
                full = render(tokenizer, messages[:k], in_mode(row, mode), generation=generation)
            except Exception:  # a prefix that cannot be rendered proves nothing
                continue
            if full.startswith((text, text.lstrip(" "))) or full.replace(" ", "").startswith(text.replace(" ", "")):
                return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# The reference: one row per turn, the prompt as generation gets it and the response behind it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The two lists of a masked row; mutable, so that tests can break it."""

    input_ids: list[int]
    labels: list[int]


def reference_rows(tokenizer: Any, row: dict[str, Any], *, stop_ids: set[int], train_on: str = "all") -> list[Row]:
    """The slowest correct masking: prompt and response of every turn tokenised apart and joined, a row for each turn.

    The first of the row's forms in which every turn can be exact.

    Raises:
        ValueError: where a turn cannot be exact, in any form.
    """
    reason = ValueError("the row has no form")
    for form in variants(row):
        try:
            return _reference_rows(tokenizer, form, stop_ids=stop_ids, train_on=train_on)
        except ValueError as error:
            reason = error
    raise reason


def _reference_rows(tokenizer: Any, row: dict[str, Any], *, stop_ids: set[int], train_on: str) -> list[Row]:
    rows = []
    for k in trainable(row["messages"], train_on):
        expected = turn(tokenizer, row, k, stop_ids)
        if expected.codes:
            raise ValueError(expected.why)
        text = expected.responses[0]
        options = tokenisations(tokenizer, text)
        fitting = [ids for ids in options if continuation(tokenizer, expected.prompt_ids, ids) == text]
        if not fitting:
            raise ValueError(f"turn {k}: {text!r} does not survive the tokenizer")
        before = list(expected.prompt_ids)
        rows.append(Row([*before, *fitting[0]], [IGNORE] * len(before) + list(fitting[0])))
    return rows
