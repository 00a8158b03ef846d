"""MkDocs hook: reference pages are filled in from parsers and dataclasses, so that they cannot drift.

A line ``[[help of every command]]`` becomes the commands' help, ``[[fields: pretraining.config.RunConfig]]`` a table of
a dataclass' fields.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields
from importlib.metadata import distribution
from typing import Any

PACKAGE = "nnunetv2_hiendmae"
MARKER = re.compile(r"^\[\[(fields|help of every command)(?:: (.+))?\]\]$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' hook."""
    return fill(markdown)


def fill(markdown: str) -> str:
    """A page with its markers replaced."""
    return MARKER.sub(lambda found: GENERATORS[found[1]](found[2]), markdown)


def commands() -> dict[str, str]:
    """Every command of the package and the module whose ``parser()`` describes it."""
    scripts = [e for e in distribution(PACKAGE).entry_points if e.group == "console_scripts"]
    return {e.name: e.module for e in sorted(scripts, key=lambda e: e.name)}


def command_help(name: str) -> str:
    """What ``NAME -h`` prints, at 100 columns."""
    parser = importlib.import_module(commands()[name]).parser()
    parts = [parser.format_help()]
    for action in parser._subparsers._group_actions if parser._subparsers else []:
        parts += [verb.format_help() for verb in action.choices.values()]
    return "\n".join(f"```text\n{part.rstrip()}\n```\n" for part in parts)


def every_command(_: str | None) -> str:
    return "\n".join(f"## {name}\n\n{command_help(name)}" for name in commands())


def field_table(path: str) -> str:
    """Name, type, default and meaning of each field of a dataclass."""
    module, name = path.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    meaning = field_docs(cls)
    rows = []
    for f in fields(cls):
        kind = str(f.type).replace(" | ", " or ")
        rows.append(f"| `{f.name}` | `{kind}` | {default(f)} | {cell(meaning.get(f.name, ''))} |")
    return "\n".join(["| name | type | default | |", "|---|---|---|---|", *rows])


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field, as editors show it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = field_docs(cls.__base__) if cls.__base__ is not object else {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[statement.target.id] = " ".join(value.value.split())
    return found


def default(field: Field[Any]) -> str:
    """As written in Python; a dash where a value must be given."""
    if field.default is not MISSING:
        return f"`{field.default!r}`"
    return "–" if field.default_factory is MISSING else "empty"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


GENERATORS = {"fields": field_table, "help of every command": every_command}
