"""HTML and SVG from Python: elements whose text and attributes are always escaped."""

from __future__ import annotations

import html

from fastflow.tables import printable


class Markup(str):
    """Text that is HTML already; any other text is escaped when it becomes part of an element."""

    __slots__ = ()


Child = str | None
Value = str | float | bool | None

_VOID = frozenset({"img", "link", "meta"})


def element(name: str, /, *children: Child, **attributes: Value) -> Markup:
    """One element.

    Args:
        name: of the element.
        children: text, which is escaped, or `Markup`; None is left out.
        attributes: by name, "-" written as "_" and with a "_" behind Python's own words
            (`class_`); True is an attribute without a value, None and False are left out.
    """
    inside = join(*children)
    end = "" if name in _VOID else f"{inside}</{name}>"
    return Markup(f"<{name}{''.join(map(_attribute, attributes, attributes.values()))}>{end}")


def join(*children: Child) -> Markup:
    """Children one after the other, as in `element`."""
    return Markup("".join(escaped(child) for child in children if child is not None))


def escaped(text: str) -> Markup:
    """Text as HTML; what is no visible character is replaced."""
    return text if isinstance(text, Markup) else Markup(html.escape(printable(text)))


def _attribute(name: str, value: Value) -> str:
    if value is None or value is False:
        return ""
    key = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {key}"
    return f' {key}="{escaped(value if isinstance(value, str) else f"{value:.6g}")}"'
