"""What a class is called, and the prompts made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bitgen_cli.errors import UsageError

CLASS = "{class}"
"""Stands for the class in templates and captions."""
LONGEST_CLASS = 60
"""Characters of a class word."""

_AN = re.compile(r"(?:[aeiou]|8|11\b|18\b|hour|honest|honou?r|heir)", re.IGNORECASE)
_NOT_AN = re.compile(r"(?:uni(?!n|m)|us[aeiu]|ut[ei]|ura|uri|uku|ufo|u\b|eu|ewe|once|one\b|onesie)", re.IGNORECASE)
_ARTICLE = re.compile(r"\b([Aa])n?(\s+)(?=\{class\})")


def with_article(template: str, class_word: str) -> str:
    """A template with its {class} filled in; "a" and "an" before it are made to fit."""
    n = "n" if _AN.match(class_word) and not _NOT_AN.match(class_word) else ""
    return _ARTICLE.sub(rf"\g<1>{n}\g<2>", template).replace(CLASS, class_word)


def check_class(text: str) -> str:
    """A class word with single spaces.

    Raises:
        UsageError: empty, too long, several lines, with characters that cannot be shown or mean something else in
            prompts, or with an article, which the templates bring.
    """
    word = " ".join(text.split())
    example = "a word or two, for example --class dog"
    if not word:
        raise UsageError("the class is empty", "say what kind of thing it is, for example --class dog")
    if len(text.strip().splitlines()) > 1 or not word.isprintable():
        raise UsageError(f"the class {text[:LONGEST_CLASS]!r} is not one line of text", example)
    if len(word) > LONGEST_CLASS:
        raise UsageError(f"the class has {len(word)} characters, at most {LONGEST_CLASS} can be", example)
    if set("{}[]") & set(word) or not any(character.isalnum() for character in word):
        raise UsageError(f"{word!r} cannot be a class", example)
    first, _, rest = word.partition(" ")
    if rest and first.lower() in ("a", "an"):
        raise UsageError(f"the class {word!r} has an article, which the prompts bring", f"write --class {rest!r}")
    return word


def check_templates(templates: Sequence[str]) -> list[str]:
    """Templates with single spaces.

    Raises:
        UsageError: none, or one without {class}.
    """
    for template in templates or ("",):
        if CLASS not in template:
            raise UsageError(f"template {template!r} does not contain {CLASS}", f'for example "a photo of a {CLASS}"')
    return [" ".join(template.split()) for template in templates]
