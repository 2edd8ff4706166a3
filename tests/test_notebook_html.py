"""What values show of themselves in a notebook: every name as text."""

from __future__ import annotations

from html.parser import HTMLParser

import torch

import lora_analysis as la
from lora_analysis.notebook import MOST, html_table

HOSTILE = '<img src=x onerror="alert(1)">&‮'


class Seen(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def adapter(count: int = 2) -> la.Adapter:
    updates = {f"{HOSTILE}.{i}": la.LowRankUpdate(torch.ones(4, 2), torch.eye(2, 3), 0.5) for i in range(count)}
    return la.Adapter(updates, source=HOSTILE)


def test_an_adapter_is_a_table_of_its_modules() -> None:
    seen = Seen(adapter()._repr_html_())
    assert seen.tags == {"div", "p", "table", "thead", "tbody", "tr", "th", "td"}
    assert f"Adapter {HOSTILE}: memory, 2 modules" in seen.text
    assert [f"{HOSTILE}.1", "4 × 3", "2", "0.5", "caller"] == seen.text[-5:]


def test_many_rows_are_counted() -> None:
    page = Seen(adapter(MOST + 3)._repr_html_())
    assert "and 3 more" in page.text
    assert html_table("none", ["x"], []) == "<div><p>none</p></div>"


def test_findings_and_shelves_show_themselves() -> None:
    found = la.lint(la.Adapter({HOSTILE: la.LowRankUpdate(torch.zeros(4, 2), torch.ones(2, 3), 0.5)}))
    assert isinstance(found, list)
    seen = Seen(found._repr_html_())
    assert HOSTILE in seen.text
    assert "zero-update" in seen.text
    clean = la.lint(la.Adapter({"q": la.LowRankUpdate(torch.eye(4, 2), torch.eye(2, 3), 0.5)}))
    assert Seen(type(found)()._repr_html_()).text == ["Nothing found."]
    assert all(finding.code != "zero-update" for finding in clean)
    shelf = la.atlas([adapter(), adapter()])
    assert HOSTILE in Seen(shelf._repr_html_()).text
    assert repr(shelf) == "Atlas(2 adapters, 1 starts)"  # the same A
