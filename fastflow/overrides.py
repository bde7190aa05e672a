"""Overrides from the command line: `key=value` texts applied to a tree, every check run again."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from fastflow.annotations import coerce, item_annotation, join, shown, wants_component
from fastflow.errors import ConfigError, one_of
from fastflow.parts import Lazy, Part, located, parameters
from fastflow.plain import TARGET, arguments, from_plain, parse

P = TypeVar("P", bound=Part)


@dataclasses.dataclass(frozen=True)
class _Edit:
    key: str
    path: tuple[str, ...]
    value: Any

    def inside(self) -> _Edit:
        return dataclasses.replace(self, path=self.path[1:])


def override(root: P, assignments: Iterable[str], allow: Iterable[str] = ()) -> P:
    """The tree with some values changed, every check run again.

    An assignment is `key=value`: the key is dotted (`method.metric.c`, `callbacks.0.decay`), the
    value is YAML (`1e-4`, `true`, `null`, `[1, 2]`, `"a b"`; text that YAML reads as something
    else is quoted: `"no"`, `"007"`). A component is replaced by
    `key={_target_: module:Class, c: 0.03}` or, with its defaults, by `key=module:Class`; nothing
    of the old component is kept. `key.+=value` appends to a list; to remove items, give the whole
    list. The order of assignments does not matter, except among appended items: a replaced
    component can be changed further, and checks between fields see all changes at once.

    Args:
        root: the experiment.
        assignments: texts of the form `key=value`, each key once.
        allow: further packages whose classes may be named.

    Raises:
        ConfigError: a key is unknown, repeated or empty, or a value is not accepted.
    """
    edits = [_edit(text) for text in assignments]
    counts = collections.Counter(e.key for e in edits if e.path[-1] != "+")
    for key, count in counts.items():
        if count > 1:
            raise ConfigError(f"{key}: set {count} times; once is accepted")
    return cast(P, _edited(root, Any, edits, "", tuple(allow)))


def _edit(text: str) -> _Edit:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"override {text!r} has no '='; key=value is accepted, e.g. steps=100")
    if not all(key.split(".")):
        raise ConfigError(f"override {text!r} has an empty key; key=value is accepted")
    return _Edit(key, tuple(key.split(".")), _value(value, key))


def _value(text: str, key: str) -> Any:
    value = parse(text, key)
    # YAML 1.1 reads 010 as 8 and 12:30 as 750.
    if isinstance(value, int | float) and re.match(r"\s*[-+]?(0[0-9_]|.*:)", text):
        raise ConfigError(
            f"{key}: {text!r} given, which YAML reads as {value}; write {value}, or quote a text"
        )
    return value


def _edited(
    node: Any, annotation: Any, edits: list[_Edit], where: str, allow: tuple[str, ...]
) -> Any:
    groups: dict[str, list[_Edit]] = {}
    for edit in edits:
        if edit.path:
            groups.setdefault(edit.path[0], []).append(edit.inside())
        else:
            node = _component(edit.value, annotation, edit.key, allow)
    if not groups:
        return node
    if isinstance(node, Part | Lazy):
        return _edited_node(node, groups, where, allow)
    if isinstance(node, list | tuple):
        return _edited_sequence(node, annotation, groups, where, allow)
    if isinstance(node, Mapping):
        return _edited_mapping(node, annotation, groups, where, allow)
    name, group = next(iter(groups.items()))
    raise ConfigError(
        f"{group[0].key}: {where} is {shown(node)} and has no {name!r}; {where}=value is accepted"
    )


_Groups = Mapping[str, list[_Edit]]


def _edited_node(
    node: Part | Lazy, groups: _Groups, where: str, allow: tuple[str, ...]
) -> Part | Lazy:
    cls = node.target if isinstance(node, Lazy) else type(node)
    accepted = parameters(cls)
    values = arguments(node)
    changed = {}
    for name, group in groups.items():
        key = join(where, name)
        if name not in accepted:
            inside = f"{where} ({cls.__name__})" if where else cls.__name__
            raise ConfigError(f"{group[0].key}: {inside} has no {name!r}; {one_of(name, accepted)}")
        if name not in values and all(edit.path for edit in group):
            raise ConfigError(f"{group[0].key}: {key} is not set; {key}=value is accepted")
        annotation = accepted[name].annotation
        new = _edited(values.get(name), annotation, group, key, allow)
        changed[name] = coerce(new, annotation, key)
    try:
        if isinstance(node, Lazy):
            return node.replace(**changed)
        return dataclasses.replace(node, **changed)
    except ConfigError as error:
        raise located(error, cls, where) from error


def _edited_mapping(
    node: Mapping[Any, Any], annotation: Any, groups: _Groups, where: str, allow: tuple[str, ...]
) -> dict[Any, Any]:
    keys = {str(k): k for k in node}
    each = item_annotation(annotation, None)
    changed = dict(node)
    for name, group in groups.items():
        if name not in keys:
            raise ConfigError(f"{group[0].key}: {where} has no {name!r}; {one_of(name, keys)}")
        key = keys[name]
        changed[key] = _edited(node[key], each, group, join(where, name), allow)
    return changed


def _edited_sequence(
    node: list[Any] | tuple[Any, ...],
    annotation: Any,
    groups: _Groups,
    where: str,
    allow: tuple[str, ...],
) -> list[Any]:
    items = list(node)
    for name, group in groups.items():
        if name == "+":
            each = item_annotation(annotation, len(items))
            for edit in group:
                if edit.path:
                    raise ConfigError(f"{edit.key}: nothing follows '+'; {where}.+=value accepted")
                items.append(_component(edit.value, each, edit.key, allow))
            continue
        if not (name.isascii() and name.isdigit()) or int(name) >= len(node):
            accepted = f"0 to {len(node) - 1}, or " if node else ""
            raise ConfigError(
                f"{group[0].key}: {where} has no {name!r}; its length is {len(node)}, "
                f"accepted: {accepted}+ to append"
            )
        index = int(name)
        each = item_annotation(annotation, index)
        items[index] = _edited(items[index], each, group, join(where, index), allow)
    return items


def _component(value: Any, annotation: Any, key: str, allow: tuple[str, ...]) -> Any:
    """A value from the command line, as its annotation asks."""
    if wants_component(annotation):
        if isinstance(value, str) and TARGET.fullmatch(value):
            value = {"_target_": value}
        elif isinstance(value, Mapping) and "_target_" not in value:
            raise ConfigError(
                f"{key}: a mapping without _target_ given; {{_target_: module:Class, ...}} accepted"
            )
    return coerce(from_plain(value, allow, key), annotation, key)
