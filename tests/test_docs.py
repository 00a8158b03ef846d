"""Code that the documentation points at exists."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from nnunetv2_hiendmae.nnunet.settings import FineTuneSettings

CHECKOUT = Path(__file__).parents[1]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
TESTED = CHECKOUT / "tests" / "README.md"
"""Faults and the tests that provoke them."""
REFERENCE = re.compile(r"`([\w/]+)\.py:([\w.]+)`")
NAMED_TEST = re.compile(r"(test_\w+\.py)::(test_\w+)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
sys.path.insert(0, str(CHECKOUT / "docs"))

from generate_reference import commands, fill  # noqa: E402 - a MkDocs hook lies beside the pages


def command_lines() -> list[str]:
    """Every call of one of our commands in README and documentation, with variables and comments cut off."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in re.split(r"\n|&&|;", block.replace("\\\n", " ")):
                words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True) if "hiendmae_" in line else []
                while words and "=" in words[0]:
                    words = words[1:]
                if "--no-python" in words:  # torchrun's own flags come before
                    words = words[words.index("--no-python") + 1 :]
                if words and words[0].startswith("hiendmae_"):
                    found.append(shlex.join(words))
    return found


@pytest.mark.parametrize("line", command_lines())
def test_commands_in_the_documentation_parse(line: str) -> None:
    name, *arguments = shlex.split(line)
    try:
        importlib.import_module(commands()[name]).parser().parse_args(arguments)
    except SystemExit as end:
        assert end.code == 0, f"'{line}' is not understood"


def test_reference_is_filled_in() -> None:
    page = fill((CHECKOUT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8"))
    assert all(f"## {name}" in page for name in commands()) and "--activation_checkpointing" in page
    page = fill((CHECKOUT / "docs" / "reference" / "plans-block.md").read_text(encoding="utf-8"))
    for f in fields(FineTuneSettings):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{f.name}` |"))
        assert not row.endswith("|  |"), f"{f.name} has no docstring"


def test_weights_file_is_described(pretrained: Path) -> None:
    """Every key that a file of this version has."""
    page = (CHECKOUT / "docs" / "reference" / "weights-file.md").read_text(encoding="utf-8")
    data = torch.load(pretrained, weights_only=True)
    missing = [key for key in (*data, *data["header"]) if f"`{key}`" not in page]
    assert not missing


def test_every_variable_of_ours_is_described() -> None:
    page = (CHECKOUT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    sources = [f for p in ("nnunetv2_hiendmae", "pretraining") for f in (CHECKOUT / p).rglob("*.py")]
    reads = re.compile(r"""environ(?:\.get\(|\[)["'](\w+)["']""")
    names = {name for f in sources for name in reads.findall(f.read_text(encoding="utf-8"))}
    assert {"HIENDMAE_WEIGHTS", "HIENDMAE_TIMEOUT_MINUTES"} <= names
    assert not [name for name in names if f"`{name}`" not in page]


@pytest.mark.parametrize("name", commands())
def test_help_starts_with_an_example(name: str) -> None:
    text = importlib.import_module(commands()[name]).parser().format_help()
    assert text.startswith("Example") and text.splitlines()[1].strip().startswith((name, "nnUNetv2_"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_references(page):
    for module, name in REFERENCE.findall(page.read_text(encoding="utf-8")):
        found = importlib.import_module(module.replace("/", "."))
        for part in name.split("."):
            assert hasattr(found, part), f"{module}.py:{name}"
            found = getattr(found, part)


@pytest.mark.parametrize("page", [*PAGES, TESTED], ids=lambda p: p.name)
def test_links_within_the_documentation(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_test_that_the_documentation_names_exists():
    named = {pair for page in [*PAGES, TESTED] for pair in NAMED_TEST.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (CHECKOUT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_tree_names_every_file():
    """In the room where it is: the line of a folder, and the lines below it."""
    (tree,) = re.findall(
        r"```\n(nnunetv2_hiendmae/\n.*?)```", (CHECKOUT / "docs" / "contributing.md").read_text(), re.DOTALL
    )
    package, room, named = "", "", set()
    for line in tree.splitlines():
        if not line.startswith(" "):
            package, room = line.split("/")[0], ""
        elif found := re.match(r"  (\w+)/", line):
            room = found[1]
        elif not line.startswith("   "):
            room = ""
        named |= {(package, room, word) for word in re.findall(r"\w+", line)}
    for file in (f for p in ("nnunetv2_hiendmae", "pretraining") for f in (CHECKOUT / p).rglob("*.py")):
        package, *rooms = file.relative_to(CHECKOUT).parts
        if file.stem != "__init__":
            assert (package, rooms[0] if len(rooms) > 1 else "", file.stem) in named, file


def test_every_published_quirk_has_its_row():
    text = (CHECKOUT / "docs" / "explanation" / "deviations.md").read_text(encoding="utf-8")
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert rows == list(range(1, 29))
