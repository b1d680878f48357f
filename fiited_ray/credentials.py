"""Addresses without their secrets: what logs, parameters, saved configurations and messages may show."""

from __future__ import annotations

import re
from urllib.parse import unquote

HIDDEN = "***"
_SCHEME = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:/+)?")


def redact(uri: str) -> str:
    """The address without user, password and query.

    A password may hold `# ? / @ :` unescaped: whatever stands before the last @ is hidden, and where that cannot be told from a
    query, all of it. SQLite files stay as they are: they have no password.
    """
    scheme, rest = _split(uri)
    if scheme.startswith("sqlite:///"):
        return uri
    secret, at, place = rest.rpartition("@")
    if re.search(r"[?&].*=", secret, re.DOTALL):
        return scheme + HIDDEN
    place, query, _ = place.partition("?")
    return scheme + (HIDDEN + at if at else "") + place + (query + HIDDEN if query else "")


def scrub(text: str, uri: str) -> str:
    """What a library says of an address, redacted; empty where the text would still tell a piece of what `redact` hides."""
    if redact(uri) == uri:
        return text
    text = text.replace(uri.rstrip("/"), redact(uri.rstrip("/")))
    _, rest = _split(uri)
    hidden = rest.rpartition("@")[0] + "?" + rest.partition("?")[2]
    pieces = {piece for piece in re.split(r"[:/?#@&=]", hidden) if piece}
    return "" if any(piece in text for piece in pieces | set(map(unquote, pieces))) else text


def mask_addresses(text: str) -> str:
    """Hide what stands before an @ in every address within a text."""
    return re.sub(r"(://)\S*@", rf"\1{HIDDEN}@", text)


def _split(uri: str) -> tuple[str, str]:
    begin = _SCHEME.match(uri)
    end = begin.end() if begin else 0
    return uri[:end], uri[end:]
