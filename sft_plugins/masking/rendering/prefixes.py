"""One rendering of a conversation that also gives the rendering of its prefixes, where that can be proved.

A template is a deterministic program. If, until its message loop asks for message j, it has looked at nothing but messages
0 … j−1 (no length, no later message, no end of the list), then on `messages[:j]` it does exactly the same until that point:
its output so far is the output for the prefix. What follows the loop is the same for every prefix if it reads neither the
messages nor a name that the loop assigns. So the messages are handed over in a sequence that watches how they are read:

    render([u1, a1, u2])      output   "<u>u1</u>" "<a>a1</a>" "<u>u2</u>"
    loop asks for message          0           1           2           end
    highest message read so far    –           0           1             2    each below the one asked for: proved
    render([u1, a1])          =    "<u>u1</u>" "<a>a1</a>"

A template that counts the messages, peeks at the next one (`loop.last`) or searches them first is found out by the same
means, and the prefixes concerned are rendered plainly. What a generation prompt adds is the same text for all conversations
if nothing that follows the loop comes from the messages; then it is rendered once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.environment import Template

from sft_plugins.masking.rendering.environment import aliased, quick_environment

_MARK = "__sft_plugins_end_of_message__"
_ALL = 1 << 62
_IN_VAIN = 32  # renderings that proved nothing, one after another: from then on one in so many is tried


class Prefixes(NamedTuple):
    """Renderings of `messages[:j]` without generation prompt, by j, and the values of all that decides about a prompt's tail.

    `tail_key` is None where the messages may decide about it too.
    """

    texts: dict[int, str]
    tail_key: str | None


class _Marked(NamedTuple):
    """A template with a mark at the end of its message loop, and the names that decide about a prompt's tail.

    `tail_names` is None where the messages may decide about it too.
    """

    template: Template
    tail_names: list[str] | None


@lru_cache(maxsize=32)
def _marked(source: str) -> _Marked | None:
    """None where no rendering could give those of its prefixes."""
    try:
        environment = quick_environment(source)
    except TemplateError:  # named when the row is rendered plainly
        return None
    tree = environment.parse(source)
    found = _message_loop(tree.body)
    if found is None:
        return None
    loop, after = found
    # What follows the loop must be the same for every prefix, with and without a generation prompt.
    changed = _changed_by(loop, tree)
    if _loaded(after) & changed:
        return None
    # The loop must write the same with and without it: prefixes of prompts are taken from a rendering without.
    if any("add_generation_prompt" in _loaded([node]) for node in tree.body if node not in after):
        return None
    behind = _behind(after, tree)
    # A look-up, since the sandbox examines every call at length.
    mark = nodes.Getitem(nodes.Name(_MARK, "load"), nodes.Const(0), "load")
    loop.body.append(nodes.ExprStmt(mark, lineno=loop.lineno))
    nodes.Node.set_environment(tree, environment)
    for node in tree.find_all(nodes.Node):
        if node.lineno is None:
            node.set_lineno(loop.lineno)
    template = Template.from_code(environment, environment.compile(tree), environment.globals)
    return _Marked(template, None if behind & {*changed, "strftime_now"} else sorted(behind))


class WatchedTemplate:
    """A chat template with a mark at the end of its message loop."""

    def __init__(self, source: str) -> None:
        self._marked = _marked(source)
        self._asked = self._proved = 0  # when it was last asked, and last proved something

    def prefixes(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> Prefixes | None:
        """The renderings of all `messages[:j]` for which one rendering proves them; None where it proves none."""
        self._asked += 1
        waiting = self._asked - self._proved
        if self._marked is None or (waiting > _IN_VAIN and waiting % _IN_VAIN):
            return None
        template, names = self._marked
        watch = _Watch(aliased(messages))
        context = template.new_context(
            {**variables, "messages": _Watched(watch, 0), "add_generation_prompt": False, _MARK: _EndOfMessage(watch)}
        )
        pieces: list[str] = []
        try:
            for piece in template.root_render_func(context):  # lazily: `watch` sees how much has been written
                pieces.append(piece)
                watch.written += len(piece)
        except Exception:  # an operation that the watching sequence lacks, or the template's own complaint
            return None
        if watch.end is None or watch.read_after_end:
            return None
        if watch.cuts:
            self._proved = self._asked
        text = "".join(pieces)
        tail = text[watch.end :]
        texts = {j: text[:cut] + tail for j, cut in watch.cuts.items()}
        texts[len(messages)] = text
        return Prefixes(texts, None if names is None else repr([(name, variables.get(name)) for name in names]))


class _EndOfMessage:
    """What the template looks up at the end of the loop's body."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    def __getitem__(self, _: Any) -> None:
        self._watch.ended_bodies += 1


class _Watch:
    """What has been read and written so far, shared by a sequence and its slices."""

    def __init__(self, messages: Sequence[Any]) -> None:
        self.messages = messages
        self.written = 0
        self.highest_read = -1
        self.ended_bodies = 0
        self.cuts: dict[int, int] = {}
        self.end: int | None = None
        self.read_after_end = False

    def read(self, index: int) -> None:
        self.highest_read = max(self.highest_read, index)
        self.read_after_end |= self.end is not None


class _Watched(Sequence):
    """`messages[offset:]`, reporting every look at it to its watch. Operations not defined here raise."""

    def __init__(self, watch: _Watch, offset: int) -> None:
        self._watch, self._offset = watch, offset

    def __iter__(self) -> Iterator[Any]:
        watch = self._watch
        ended = 0  # bodies, when this iteration last handed a message out
        for turn, index in enumerate(range(self._offset, len(watch.messages))):
            # One body has ended since then, and as many as turns were begun: so only in the marked loop, not in one
            # inside its body. And nothing peeked ahead of it.
            if turn and watch.ended_bodies == turn == ended + 1 and watch.highest_read < index:
                watch.cuts[index] = watch.written
            watch.read(index)
            ended = watch.ended_bodies
            yield watch.messages[index]
        in_marked_loop = watch.ended_bodies == len(watch.messages) - self._offset == ended + 1
        watch.read(_ALL)
        if in_marked_loop and watch.end is None:
            watch.end = watch.written

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            if index.stop is None and index.step in (None, 1) and (index.start or 0) >= 0:
                return _Watched(self._watch, self._offset + (index.start or 0))
            self._watch.read(_ALL)
            return self._watch.messages[self._offset :][index]
        self._watch.read(_ALL if index < 0 else self._offset + index)
        return self._watch.messages[self._offset :][index]

    def __len__(self) -> int:
        self._watch.read(_ALL)
        return len(self._watch.messages) - self._offset

    def __bool__(self) -> bool:
        # Every prefix holds at least one message; a slice's first message may be missing.
        if self._offset:
            self._watch.read(self._offset)
        return len(self._watch.messages) > self._offset

    # Python gives every object these two; without them a comparison or a printed list would be wrong unseen.
    def __eq__(self, other: object) -> bool:
        self._watch.read(_ALL)
        mine = self._watch.messages[self._offset :]
        return mine == (other._watch.messages[other._offset :] if isinstance(other, _Watched) else other)

    def __repr__(self) -> str:
        self._watch.read(_ALL)
        return repr(self._watch.messages[self._offset :])


def _message_loop(body: list[Any]) -> tuple[Any, list[Any]] | None:
    """The last loop at the top of the template (or in an `if` there) that writes, and all nodes that may run after it."""
    for position in range(len(body) - 1, -1, -1):
        node, after = body[position], body[position + 1 :]
        if isinstance(node, nodes.For) and node.find(nodes.Output) and not node.else_:
            return node, after
        if isinstance(node, nodes.If):
            for branch in (node.body, *(clause.body for clause in node.elif_), node.else_):
                found = _message_loop(branch)
                if found is not None:
                    return found[0], [*found[1], *after]
    return None


def _changed_by(loop: Any, tree: Any) -> set[str]:
    """Names whose value or output after the loop may tell how many messages there were.

    Those that the loop or a macro assigns, `messages`, objects with a state of their own, and what is made from such a name.
    """
    makers = [({macro.name}, _loaded(macro.body) | _stored(macro.body)) for macro in tree.find_all(nodes.Macro)]
    makers += [(_stored([assign.target]), _loaded([assign.node])) for assign in tree.find_all(nodes.Assign)]
    changed = _stored([loop, *tree.find_all(nodes.Macro)])
    changed |= {name for made, used in makers if used & {"cycler", "joiner"} for name in made}
    while more := {name for made, used in makers if used & changed for name in made} - changed:
        changed |= more
    return changed | {"messages"}  # what is made from the messages is watched when it is read


def _behind(after: list[Any], tree: Any) -> set[str]:
    """Every name that may decide about what `after` writes: those that it loads, and all that stands where one is set."""
    behind, statements = _loaded(after), [(_loaded([node]), _stored([node]) | _macros(node)) for node in tree.body]
    while more := {name for loaded, stored in statements if stored & behind for name in loaded} - behind:
        behind |= more
    return behind


def _macros(node: Any) -> set[str]:
    own = {node.name} if isinstance(node, nodes.Macro) else set()
    return own | {macro.name for macro in node.find_all(nodes.Macro)}


def _loaded(tree: list[Any]) -> set[str]:
    return {name.name for node in tree for name in _names(node) if name.ctx == "load"}


def _stored(tree: list[Any]) -> set[str]:
    assigned = {name.name for node in tree for name in _names(node) if name.ctx != "load"}
    return assigned | {reference.name for node in tree for reference in node.find_all(nodes.NSRef)}


def _names(node: Any) -> list[Any]:
    return [*([node] if isinstance(node, nodes.Name) else []), *node.find_all(nodes.Name)]
