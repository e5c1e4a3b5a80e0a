"""The keys of a configuration: dotted names, what each accepts, errors in those words. No torch here."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from bitgen_cli.config import INVARIANT, Config, Section

LONGEST_VALUE = 60
"""Characters of a wrong value that an error message shows."""

Where = Callable[[str], str]
"""A dotted key to where its value comes from, for example `demo.yaml line 3`; empty when nobody gave it."""


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section a field holds; None when it holds a value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def known_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values, for example `model.tokenizer.bits`, in the order of their declaration."""
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is None:
            yield prefix + name
        else:
            yield from known_keys(inner, f"{prefix}{name}.")


def flatten(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value (plain JSON) of everything in a section; a section that is not there is None."""
    plain = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, plain[name]


def show(value: Any) -> str:
    """A value as one short line, as it could stand in a file."""
    try:
        text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        try:
            text = str(value)
        except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
            text = f"a {type(value).__name__} too large to show"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def nearest(key: str, section: type[Section] = Config, prefix: str = "") -> str:
    """What may have been meant by an unknown key: a hint to put behind the message.

    Args:
        key: its last part.
        section, prefix: where it was found.
    """
    names = list(section.model_fields)
    close = difflib.get_close_matches(key, names, 1)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    elsewhere: dict[str, list[str]] = {}
    for full in known_keys():
        elsewhere.setdefault(full.rpartition(".")[2], []).append(full)
    close = difflib.get_close_matches(key, elsewhere, 1)
    if close:
        # of keys with the same last part, one in the section of the mistake
        best = max(elsewhere[close[0]], key=lambda full: full.startswith(prefix))
        return f"did you mean {best}?"
    return f"known here: {', '.join(names)}"


def accepts(key: str) -> str:
    """What a value may be, for example `a whole number from 1 to 64`; for a section, its keys."""
    section: type[Section] = Config
    found: FieldInfo | None = None
    for name in key.split("."):
        found = section.model_fields[name]
        section = section_of(found) or section
    assert found is not None
    inner = section_of(found)
    if inner is not None:
        return f"a section with {', '.join(inner.model_fields)}"
    example = f", such as {show(found.examples[0])}" if found.examples else ""
    return _describe(found.annotation, found.metadata) + example


def problems(error: ValidationError, where: Where) -> list[str]:
    """One line for each wrong value: dotted key, value, what is accepted, where it came from.

    Args:
        error: of validating a `Config`.
        where: tells where a key's value comes from.
    """
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key, inside = _split(detail["loc"])
        # the branches of "a number or a list" each complain about one value: one line is enough
        place = key + "".join(inside)
        lines.setdefault(place, _line(key, place, detail, where))
    return list(lines.values())


def _line(key: str, place: str, detail: ErrorDetails, where: Where) -> str:
    origin = where(key)
    behind = f" ({origin})" if origin else ""
    if detail["type"] == INVARIANT:
        return f"{place} = {show(detail['input'])}: {detail['msg']}{behind}"
    if detail["type"] == "missing" and place == key:
        return f"{place}: missing; must be {accepts(key)}{behind}"
    return f"{place} = {show(detail['input'])}: must be {accepts(key)}{behind}"


def _split(location: Sequence[str | int]) -> tuple[str, list[str]]:
    """The dotted key an error is about, and the place inside its value, such as `[2]`."""
    section: type[Section] | None = Config
    names: list[str] = []
    rest = list(location)
    while section is not None and rest and rest[0] in section.model_fields:
        name = str(rest.pop(0))
        names.append(name)
        section = section_of(section.model_fields[name])
    inside = [f"[{part}]" if isinstance(part, int) else f'["{part}"]' for part in rest]
    key = ".".join(names)
    return key, inside if _plain_list(key) else []


def _plain_list(key: str) -> bool:
    """Whether an error's location inside that value is a place in a list, and not a type's name."""
    *path, last = key.split(".")
    section: type[Section] = Config
    for name in path:
        section = section_of(section.model_fields[name]) or section
    options = [a for a in _options(section.model_fields[last].annotation) if a is not NoneType]
    return len(options) == 1


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _describe(annotation: Any, limits: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], [*limits, *_flat(arguments[1:])])
    if origin in (Union, UnionType):
        return ", or ".join(
            "null" if option is NoneType else _describe(option, limits) for option in arguments
        )
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    filled = " that is not empty" if any(isinstance(limit, MinLen) for limit in limits) else ""
    if origin is list:
        return f"a list{filled}, each {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping{filled}"
    words: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words[annotation] + filled + _range(limits)


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Limits out of Field(...) objects."""
    return [
        limit for item in metadata for limit in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]


def _plain(limit: Any) -> str:
    """A number without needless digits."""
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _range(limits: Sequence[Any]) -> str:
    """The limits of a number in words, with a space before them."""
    found = {type(limit): limit for limit in limits}
    ge, gt, le, lt = (found.get(kind) for kind in (Ge, Gt, Le, Lt))
    high = f"{_plain(le.le)}" if le else f"below {_plain(lt.lt)}" if lt else ""
    limit = f"at most {high}" if le else high
    if ge:
        return f" from {_plain(ge.ge)} to {high}" if high else f" of at least {_plain(ge.ge)}"
    if gt:
        return f" above {_plain(gt.gt)}" + (f" and {limit}" if limit else "")
    return f" of {limit}" if le else f" {limit}" if limit else ""
