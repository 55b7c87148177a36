"""Citations as BibTeX."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnbench.method import Citation

_MINOR = {"a", "an", "the", "on", "in", "of", "for", "is"}
_SPECIAL = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "^": r"\textasciicircum{}"}


def key(citation: Citation) -> str:
    """`surname`, year and the first telling word of the title, in ASCII: `vaswani2017attention`."""
    surname = citation.authors.split()[0]
    words = [word for word in re.findall(r"[a-z0-9]+", _plain(citation.title)) if word not in _MINOR]
    return f"{re.sub(r'[^a-z]', '', _plain(surname))}{citation.year}{words[0] if words else ''}"


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def entry(citation: Citation) -> str:
    """One entry; a venue other than arXiv makes it `inproceedings`, and `et al.` becomes `others`, which styles print as they do."""
    venue = "" if "arxiv" in citation.venue.lower() else citation.venue
    found = re.search(r"arxiv\.org/abs/([\w.]+)", citation.url)
    fields = {
        "author": re.sub(r",?\s*et al\.?$", " and others", citation.authors),
        "title": f"{{{_escaped(citation.title)}}}",
        "booktitle": _escaped(venue),
        "year": str(citation.year),
        "eprint": found[1] if found else "",
        "archiveprefix": "arXiv" if found else "",
        "note": rf"\url{{{citation.url}}}",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{'inproceedings' if venue else 'misc'}{{{key(citation)},", *lines, "}"])


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)


def bibliography(citations: Iterable[Citation]) -> str:
    """Each work once, by key."""
    return "\n\n".join(entry(c) for _, c in sorted({key(c): c for c in citations}.items())) + "\n"
