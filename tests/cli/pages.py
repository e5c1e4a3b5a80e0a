"""The pages in docs/ and their generator, for the tests of them."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@cache
def generator() -> ModuleType:
    """docs/generate.py, which lies outside the package."""
    specification = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # dataclasses look their module up
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def reference() -> str:
    return (DOCS / "reference.md").read_text(encoding="utf-8")
