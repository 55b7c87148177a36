"""Reading a page back: its elements, its texts, and its plots by their captions."""

from __future__ import annotations

import base64
import zlib
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from cli_support import call

if TYPE_CHECKING:
    from pathlib import Path

VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Holds that elements are closed in order, and keeps what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[dict[str, str | None]] = []
        self.fetched: list[str] = []
        self.data: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr" and "data-method" in values:
            self.rows.append(values)
        self.fetched += [str(v) for k, v in attrs if k in ("src", "srcset", "data", "action", "poster") or (k == "href" and tag != "a")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.setdefault(self.open[-1] if self.open else "", []).append(data)


def unpacked(text: str) -> str:
    return zlib.decompress(base64.b64decode(text)).decode()


def plots_of(results: Path) -> dict[str, str]:
    """Plots of the page of a results folder, by their captions."""
    assert call("report", results, "--html", results / "page.html").exit_code == 0
    page = Page((results / "page.html").read_text(encoding="utf-8"))
    return dict(zip(page.data["figcaption"], [unpacked(t) for t in page.data["script"] if t.startswith("eN")], strict=False))
