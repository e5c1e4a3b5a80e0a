"""The pages in docs/: the reference is fresh, links lead somewhere, what is quoted is still in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pages
import pytest

import bitgen_cli
from bitgen_cli.config import Config, Section
from bitgen_cli.config_keys import known_keys, section_of

SOURCE = Path(bitgen_cli.__file__).parent
PAGES = [pages.ROOT / "README.md", pages.ROOT / "CONTRIBUTING.md", *sorted(pages.DOCS.glob("*.md"))]
LARGEST_PICTURE = 100_000
"""Bytes: pages are read over slow lines too."""


def test_the_reference_is_fresh() -> None:
    assert pages.reference() == pages.generator().page(), "stale: run `python -m docs.generate`"


def test_every_configuration_key_says_what_it_is() -> None:
    for key in known_keys():
        section: type[Section] = Config
        for name in key.split("."):
            field = section.model_fields[name]
            section = section_of(field) or section
        assert field.description, key


def test_every_variable_read_of_the_environment_is_in_the_reference() -> None:
    told = {name for names in pages.generator().ENVIRONMENT for name in names.split(", ")}
    read = set()
    for file in SOURCE.rglob("*.py"):
        read |= set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', file.read_text(encoding="utf-8")))
    assert read
    assert read <= told


def _anchors(page: Path) -> set[str]:
    """What can stand behind # in a link to that page, as GitHub makes it of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", page.read_text(encoding="utf-8"))
    for link in links:
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in _anchors(file), link


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/how-it-works.md"])
def test_files_named_on_a_page_are_there(name: str) -> None:
    folders = [pages.ROOT / folder for folder in ("bitgen_cli", "completions", "docs", "tests")]
    files = {path.relative_to(pages.ROOT).as_posix() for folder in folders for path in folder.rglob("*.py")}
    named = re.findall(r"`([\w/]+\.py)`", (pages.ROOT / name).read_text(encoding="utf-8"))
    assert named
    assert [one for one in named if not any(f"/{file}".endswith(f"/{one}") for file in files)] == []


def test_every_page_is_reached_from_the_readme() -> None:
    text = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if f"docs/{page.name}" not in text] == []


def test_pictures_of_the_pages_are_small_and_used() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in [*pages.DOCS.rglob("*.png"), *pages.DOCS.rglob("*.webp")]:
        assert picture.stat().st_size < LARGEST_PICTURE
        assert picture.name in text


def quoted() -> list[str]:
    """The first cell of each row of the tables in troubleshooting.md."""
    text = (pages.DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def written() -> str:
    """All text constants of the code, those of one f-string joined, with … for what is put in."""
    found = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_still_in_the_code() -> None:
    rows, code = quoted(), written()
    assert 25 <= len(rows) <= 45
    assert [row for row in rows if row not in code] == []


