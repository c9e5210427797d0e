"""The shell of every page, in a real browser: quiet, offline, light and dark, and within reach of the keyboard."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from sft_plugins.cli.ui.pages import render_page, write_page
from sft_plugins.errors import AssetError
from testkit.browser import open_page

BODY = """<h1>Shell</h1><a href="#end">to the end</a><details><summary>more</summary>hidden</details>
<button>press</button><p id="end">the end</p>"""


def page(folder: Path, body: str = BODY, script: str = "") -> Path:
    html = render_page("base.html.j2")
    html = html.replace("<main>", f"<main>{body}").replace("</body>", f"<script>{script}</script></body>")
    return write_page(folder / "deep" / "page.html", html)


def test_the_shell_is_quiet_offline_and_reachable_by_keyboard_in_light_and_dark(tmp_path: Path) -> None:
    path = page(tmp_path)
    light, dark = open_page(path), open_page(path, dark=True, width=400)
    for one in (light, dark):
        assert one.console == []
        assert one.requests == []
        assert [stop.words for stop in one.tab_stops] == ["to the end", "more", "press"]
        assert all(stop.ring for stop in one.tab_stops)
        assert one.screenshot.stat().st_size > 1000
    assert light.background != dark.background
    assert dark.width == 400, "nothing is wider than a phone"
    assert "the end" in light.text


def test_the_browser_sees_what_a_page_does_wrong(tmp_path: Path) -> None:
    """What the tests of pages rest on: an error, a request and a lost focus ring do show."""
    path = page(
        tmp_path,
        BODY + '<img src="http://127.0.0.1:9/none.png" alt=""><style>button:focus-visible { outline: none }</style>',
        "console.error('said'); undefined_name();",
    )
    found = open_page(path)
    assert found.requests == ["http://127.0.0.1:9/none.png"]
    assert "said" in found.console
    assert any("undefined_name is not defined" in line for line in found.console)
    assert [stop.ring for stop in found.tab_stops] == [True, True, False]


def test_a_name_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render_page("collapse/report/report.html.j2")
    with pytest.raises(jinja2.TemplateNotFound):
        render_page("no-such-page.html.j2")


def test_a_page_that_cannot_be_written_is_said_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(AssetError, match="the page cannot be written") as caught:
            write_page(path, "<p>")
        assert caught.value.code == "unwritable"
        assert caught.value.remedy
