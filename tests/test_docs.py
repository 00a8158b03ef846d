"""Code that the documentation points at exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PAGES = sorted((CHECKOUT / "docs").rglob("*.md"))
REFERENCE = re.compile(r"`([\w/]+)\.py:([\w.]+)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_references(page):
    for module, name in REFERENCE.findall(page.read_text(encoding="utf-8")):
        found = importlib.import_module(module.replace("/", "."))
        for part in name.split("."):
            assert hasattr(found, part), f"{module}.py:{name}"
            found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_within_the_documentation(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_published_quirk_has_its_row():
    text = (CHECKOUT / "docs" / "explanation" / "deviations.md").read_text(encoding="utf-8")
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert rows == list(range(1, 28))
