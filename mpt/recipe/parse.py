"""From YAML text to nodes that know their place: no tags, no second meanings, bounded size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from mpt.recipe import scalar
from mpt.recipe.problem import Problem
from mpt.recipe.source import KEY, MAX_DEPTH, MAX_NODES, MAX_TEXT, Node, Place, Report, Unreadable

_PlaceOf = Callable[[Any], Place]
"""From a mark of PyYAML (its stubs know three kinds) to a place of ours."""
_Opening = ScalarEvent | SequenceStartEvent | MappingStartEvent
_START = Place(1, 1)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_NOT_IN_A_FILE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class YamlError(Exception):
    """The text is not YAML that a recipe may be written in, and reading it stops here."""

    def __init__(self, place: Place, what: str) -> None:
        super().__init__(what)
        self.place = place
        self.what = what


def document(text: str, report: Report) -> Node:
    """Return the root mapping of a recipe file.

    Raises:
        YamlError: if the text cannot be read to its end.
    """
    if odd := _NOT_IN_A_FILE.search(text):
        before = text[: odd.start()].split("\n")
        place = Place(len(before), len(before[-1]) + 1)
        raise YamlError(place, f"the control character {odd[0]!r} has no place in a recipe.")
    root = _one_node(text, lambda mark: Place(mark.line + 1, mark.column + 1), report)
    if not isinstance(root.value, dict):
        raise YamlError(root.place, f"a recipe is keys and values, not {_kind(root)}.")
    return root


def value(text: str, key: str, place: Place, report: Report) -> Node:
    """Return the value of an override: a bare word, or quoted text, a [list] or a {mapping}.

    Raises:
        YamlError: if it starts like a list, a mapping or a quote and is none.
    """
    if text.startswith(("[", "{", "'", '"')):
        return _one_node(text, lambda _mark: place, report, key)
    node = Node(scalar.read(text), place, place)
    return _checked(node, key, report)


def _kind(node: Node) -> str:
    match node.value:
        case list():
            return "a list"
        case None:
            return "nothing: this document is empty"
        case _:
            return "a single value"


def _one_node(text: str, place_of: _PlaceOf, report: Report, key: str = "") -> Node:
    events = _events(text, place_of)
    next(events)  # the start of the stream
    if isinstance(next(events), StreamEndEvent):
        raise YamlError(_START, "the recipe is empty.")
    root = _Builder(events, place_of, report).node(next(events), key, None, depth=0)
    next(events)  # the end of the document
    after = next(events)
    if isinstance(after, DocumentStartEvent):
        raise YamlError(place_of(after.start_mark), "a second document starts here; keep one.")
    return root


def _events(text: str, place_of: _PlaceOf) -> Iterator[Event]:
    place = place_of(yaml.Mark("", 0, 0, 0, None, 0))
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = place_of(event.end_mark)
            yield event
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(place_of(mark) if mark else place, _syntax(error, text)) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets these out of escapes such as "\UFFFFFFFF" and endless version numbers.
        raise YamlError(place, "cannot be read as YAML: a number in it is too large.") from error


def _syntax(error: yaml.MarkedYAMLError, text: str) -> str:
    if "'\\t'" in (error.problem or ""):
        return "a tab stands here; YAML takes only spaces between things."
    mark = error.problem_mark
    if mark is not None and text[: mark.index + 1].endswith("${"):
        return 'inside [ ] and { }, put a reference in quotes: "${section.key}".'
    context = f" {error.context}" if error.context else ""
    return f"cannot be read as YAML: {error.problem}{context}."


class _Builder:
    """Turns the events of one document into nodes, counting as it goes."""

    def __init__(self, events: Iterator[Event], place_of: _PlaceOf, report: Report) -> None:
        self.events = events
        self.place_of = place_of
        self.report = report
        self.anchors: dict[str, tuple[Node, int]] = {}  # with the number of nodes in it
        self.n_nodes = 0

    def node(self, event: Event, key: str, key_place: Place | None, *, depth: int) -> Node:
        place = self.place_of(event.start_mark)
        key_place = key_place or place
        if isinstance(event, AliasEvent):
            return self._alias(event, place, key_place)
        assert isinstance(event, _Opening)
        before = self.n_nodes
        self._count(1, place)
        if depth > MAX_DEPTH:
            raise YamlError(place, f"nested more than {MAX_DEPTH} levels deep.")
        built = self._built(event, key, place, key_place, depth)
        if event.tag is not None:
            # A tag asks the reader to make something other than plain data of a value.
            self._complain(
                key, f"the tag {_tag(event)} is not allowed; write a plain value.", place
            )
            built = Node(Unreadable(), place, key_place)
        if event.anchor:
            self.anchors[event.anchor] = (built, self.n_nodes - before)
        return built

    def _alias(self, event: AliasEvent, place: Place, key_place: Place) -> Node:
        if event.anchor not in self.anchors:
            raise YamlError(place, f"*{event.anchor} has no &{event.anchor} before it.")
        original, n_nodes = self.anchors[event.anchor]
        self._count(n_nodes, place)  # as if it were written out: aliases of aliases grow fast
        return Node(original.value, place, key_place)

    def _count(self, n: int, place: Place) -> None:
        self.n_nodes += n
        if self.n_nodes > MAX_NODES:
            raise YamlError(place, f"more than {MAX_NODES} values, aliases written out.")

    def _built(self, event: _Opening, key: str, place: Place, key_place: Place, depth: int) -> Node:
        if isinstance(event, ScalarEvent):
            bare = event.style is None
            node = Node(scalar.read(event.value) if bare else event.value, place, key_place)
            return _checked(node, key, self.report)
        # A block starts at its first child; what is said of the whole belongs to its key.
        start = place if event.flow_style else key_place
        if isinstance(event, SequenceStartEvent):
            return Node(self._items(key, depth), start, key_place)
        return Node(self._entries(key, depth), start, key_place)

    def _items(self, key: str, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            items.append(self.node(event, f"{key}[{len(items)}]", None, depth=depth + 1))
        return items

    def _entries(self, key: str, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            place = self.place_of(event.start_mark)
            name = self._name(event, key, place, depth)
            path = f"{key}.{name}".removeprefix(".")
            child = self.node(next(self.events), path, place, depth=depth + 1)
            if name in entries:
                first = entries[name].key_place
                self._complain(path, f"written twice; first on line {first.line}.", place)
            elif name is not None:
                entries[name] = child
        return entries

    def _name(self, event: Event, key: str, place: Place, depth: int) -> str | None:
        if not isinstance(event, ScalarEvent):
            self.node(event, key, None, depth=depth + 1)  # read past it
            self._complain(key, "a list, a mapping or an alias cannot be a key.", place)
            return None
        if event.tag is not None:
            self._complain(key, f"the tag {_tag(event)} on a key is not allowed.", place)
            return None
        name: str = event.value
        if not KEY.fullmatch(name):
            self._complain(key, _not_a_key(name), place)
            return None
        return name

    def _complain(self, key: str, what: str, place: Place) -> None:
        self.report.add(Problem(key, what), place)


def _tag(event: _Opening) -> str:
    return scalar.show(str(event.tag).replace("tag:yaml.org,2002:", "!!"))


def _not_a_key(name: str) -> str:
    section, dot, rest = name.partition(".")
    if dot and KEY.fullmatch(section) and KEY.fullmatch(rest):
        return f"{name!r} is not a key; write `{rest}:` on a line of its own under `{section}:`."
    if name == "<<":
        return "merge keys (<<) are not supported; write the keys out."
    return f"{scalar.show(name)} is not a key; keys are letters, digits, '_' and '-', at most 64."


def _checked(node: Node, key: str, report: Report) -> Node:
    text = node.value
    if not isinstance(text, str):
        return node
    if len(text) > MAX_TEXT:
        what = f"{len(text)} characters are more than the {MAX_TEXT} a value may have."
    elif odd := _CONTROL.search(text):
        what = f"{scalar.show(text)} has the control character {odd[0]!r} in it."
    else:
        return node
    report.add(Problem(key, what), node.place)
    return Node(Unreadable(), node.place, node.key_place)
