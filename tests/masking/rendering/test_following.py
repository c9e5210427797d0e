"""Everything that Jinja can do with a hidden value: the text that the template gives comes of it, or no text at all."""

from __future__ import annotations

import itertools

import pytest

from sft_plugins.masking.rendering.environment import quick_environment
from testkit.shapes import END, FOR, TEXTS, held

ENVIRONMENT = quick_environment("")
# The value of which the template is to learn something, in every form in which it may come.
VALUES = {
    "text": "m.content",
    "made": "(m.content | trim)",
    "joined": "(m.content ~ '!' + m.role)",
    "list": "[m.content, 'x']",
    "mapping": "{'k': m.content}",
    "message": "m",
    "messages": "messages",
    "number": "m.n",
    "length": "(m.content | length)",
    "arguments": "messages[1].tool_calls[0].function.arguments",
    "json": "(m | tojson)",
    "method": "m.content.strip",
    "written": "m.content | safe",
}
BY_CHANCE = {"random"}
ARGUMENTS = ("", "('a')", "(2)", "(m.content)", "(m.n)", "('a', 'b')", "(attribute='content')", "('content')")
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or"]
OTHERS = ("'a'", "1", "true", "['a', m.content]", "messages[0].content", "'%s'", "missing")


def uses(expression: str) -> str:
    """A template that writes the expression and decides by it."""
    return FOR + f"[{{{{ {expression} }}}}|{{% if {expression} %}}yes{{% endif %}}]" + END


@pytest.mark.parametrize("name", sorted(set(ENVIRONMENT.filters) - BY_CHANCE))
def test_every_filter_of_everything(name: str) -> None:
    for value in VALUES.values():
        held(uses(f"({value}) | {name}"))
    for value, arguments in itertools.product(("m.content", "messages"), ARGUMENTS):
        held(uses(f"{value} | {name}{arguments}"))
    held(uses(f"'a b' | {name}(m.content)"))


@pytest.mark.parametrize("name", sorted(set(ENVIRONMENT.tests)))
def test_every_test_of_everything(name: str) -> None:
    for value in VALUES.values():
        held(uses(f"[{value}] | select('{name}') | list | length"))
    for value, other in itertools.product(
        ("m.content", "m.n", "[m.content]", "'a'"), ("'a'", "0", "m.content", "messages")
    ):
        held(uses(f"[{value}] | select('{name}', {other}) | list | length"))


@pytest.mark.parametrize("name", [name for name in dir(str) if name[:2] != "__"])
def test_every_method_of_a_text(name: str) -> None:
    held(uses(f"m.content['{name}']"))
    for arguments in ("()", "('a')", "(1)", "(m.content)", "('a', 'b')", "('a', 1)", "(['a', m.content])", "(m.n)", ""):
        held(uses(f"m.content.{name}{arguments}"))
    for arguments in ("(m.content)", "(['a', m.content])", "('a', m.content)"):
        held(uses(f"'a b'.{name}{arguments}"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_on_either_side(operator: str) -> None:
    for value, other in itertools.product(("m.content", "m.n", "(m.content | length)", "[m.content]", "m"), OTHERS):
        held(uses(f"{value} {operator} {other}"))
        held(uses(f"{other} {operator} {value}"))


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_every_look_into_everything(value: str) -> None:
    for look in (
        "[0]", "[-1]", "[1:]", "[:1]", "[::-1]", "['content']", "[m.content]", "[m.n]", "[m.n:]", "[messages]", ".content",
        ".missing", ".__class__", ".items()", ".keys()", ".get(m.content)", ".get('content', m.n)", ".index(m.content)",
        ".count(m.content)",
    ):  # fmt: skip
        held(uses(f"({value}){look}"))
    for statement in (
        "{% for x in VALUE %}<{{ x }}>{% endfor %}",
        "{% for x in VALUE if x %}<{{ loop.index }}>{% endfor %}",
        "{% for k, v in VALUE.items() %}{{ k }}={{ v }};{% endfor %}",
        "{% set ns = namespace(x=VALUE) %}{% set ns.y = ns.x %}{{ ns.y }}",
        "{% set x %}{{ VALUE }}{% endset %}{{ x | trim }}{{ x | length > 3 }}",
        "{% filter trim %} {{ VALUE }} {% endfilter %}",
        "{% macro f(x) %}({{ x }}){% endmacro %}{{ f(VALUE) }}{{ f(VALUE).strip('(') == 'abc)' }}",
        "{% macro f(x) %}{{ caller(x) }}{% endmacro %}{% call(y) f(VALUE) %}{{ y }}{% endcall %}",
        "{% generation %}{{ VALUE }}{% endgeneration %}",
        "{% autoescape true %}{{ VALUE }}{% endautoescape %}",
        "{{ loop.changed(VALUE) }}{{ loop.cycle(VALUE, 'b') }}",
        "{{ range(VALUE) | list }}",
        "{{ dict(a=VALUE).a }}",
        "{{ cycler(VALUE, 1).next() }}{{ joiner(VALUE)() }}",
        "{% if not VALUE %}{{ raise_exception('no') }}{% endif %}",
        "{{ raise_exception(VALUE) }}",
        "{{ VALUE() }}",
        "{{ -VALUE }}",
        "{{ 'a' if VALUE else 'b' }}",
        "{{ strftime_now('%Y') ~ VALUE }}",
        "{{ [VALUE, VALUE] | join(VALUE) }}{{ ', '.join([VALUE, 'x']) }}",
        "{{ VALUE | tojson(indent=2) }}{{ [VALUE] | tojson(sort_keys=true) }}",
        "{{ {'b': VALUE, 'a': 'Zhidden0neddihZ'} | tojson(ensure_ascii=true, separators=(',', ':')) }}",
        "{{ [m.content, 'b'] | sort }}{{ [m.content, 'b'] | unique | list }}{{ [VALUE] | sort | first }}",
        "{{ messages | selectattr('content', 'equalto', VALUE) | list | length }}",
        "{{ messages | map(attribute='content') | select('in', VALUE) | list | length }}",
    ):
        held(FOR + statement.replace("VALUE", f"({value})") + END, missing=[1])


@pytest.mark.parametrize(
    "look",
    [
        "{'Hello': 1, '7': 2}[m.content]", "{'Hello': 1, '7': 2}.get(m.content, 'none')", "m.content in {'Hello': 1, '7': 2}",
        "['Hello', '7'].index(m.content)", "['Hello', '7'].count(m.content)",
        "[m.content, 'Hello', '7'] | unique | list | length", "messages | groupby('content') | list | length",
        "{7: 1, 0: 2}[m.n]", "m.n in {7: 1}", "'abcdefgh'[m.n]", "'abcdefgh'[m.n:]", "'abcdefgh'[m.content | length]",
        "'abcdefgh'[(m.content | length):]", "range(m.n) | list", "'ab' * m.n", "m is sameas(m)",
        "{m.content: 1} == {'Hello': 1}", "(m.content, 1) in {('Hello', 1): 2}", "dict(a=m.content) == {'a': 'Hello'}",
        "m.content is in ['Hello', '7']", "m.content is in 'Hello there'", "m.content in 'Hello there'", "m.n == true",
        "m.n == 7.0", "(m.content | length) == true", "(m.content | length) == 5", "m.content[:5] == 'Hello'",
        "m.content.split('a') | length",
        "m.content == ('Hello' | safe)", "('Hello' | safe) == m.content", "m.content in ['Hello' | safe, '7' | safe]",
        "m.content != ('Hello' | safe)", "m.content.strip == m.content.strip", "m.content.strip in [m.content.strip]",
        "m.content.__class__ is defined", "m.content.__len__ is defined", "m.content.strip is defined",
        "('x' if m.content.__class__ else 'y')", "m.content.strip is sameas(m.content.strip)",
    ],
)  # fmt: skip
def test_a_hidden_value_is_no_key_that_is_missing(look: str) -> None:
    """Python and Jinja take many a failure to look something up for an answer."""
    held(uses(look), len(TEXTS))
