"""`WatchedTemplate` where its rendering proves nothing: it is asked seldom then, and at once again where it does."""

from __future__ import annotations

from typing import Any

from sft_plugins.masking.rendering.prefixes import _IN_VAIN, WatchedTemplate
from testkit.shapes import END, FOR

# Where the system message stands first, what is written before the loop depends on how many messages there are.
SOURCE = "{% if messages[0].role == 'system' %}{{ messages | length }}{% endif %}" + FOR + "{{ m.content }};" + END
PLAIN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = [{"role": "system", "content": "s"}, *PLAIN]


def proved(watched: WatchedTemplate, messages: list[dict[str, Any]]) -> bool:
    found = watched.prefixes(messages, {})
    return found is not None and len(found.texts) > 1


def test_a_template_that_proves_nothing_is_rendered_seldom(monkeypatch: Any) -> None:
    watched, rendered = WatchedTemplate(SOURCE), 0
    assert watched._marked is not None
    own = watched._marked.template.new_context

    def counted(variables: dict[str, Any]) -> Any:
        nonlocal rendered
        rendered += 1
        return own(variables)

    monkeypatch.setattr(watched._marked.template, "new_context", counted)
    assert not any(proved(watched, SYSTEM) for _ in range(5 * _IN_VAIN))
    assert rendered == _IN_VAIN + 4


def test_what_proves_something_again_is_rendered_each_time_again() -> None:
    watched = WatchedTemplate(SOURCE)
    assert proved(watched, PLAIN)
    for _ in range(3 * _IN_VAIN):
        assert not proved(watched, SYSTEM)
    found = [proved(watched, PLAIN) for _ in range(2 * _IN_VAIN)]
    assert found.index(True) < _IN_VAIN
    assert all(found[found.index(True) :])
