"""What is tracked stays small enough to clone at once."""

from __future__ import annotations

import subprocess

import pytest
from conftest import CHECKOUT

LIMIT = 4_200_000
"""Bytes of all tracked files together."""


@pytest.mark.skipif(not (CHECKOUT / ".git").exists(), reason="no git checkout")
def test_tracked_files_are_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, check=True).stdout
    files = [CHECKOUT / name.decode() for name in listed.split(b"\0") if name]
    sizes = {str(file.relative_to(CHECKOUT)): file.lstat().st_size for file in files if file.exists()}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    assert sum(sizes.values()) < LIMIT, f"largest: {', '.join(f'{name} ({sizes[name]:,})' for name in largest)}"
    assert len(sizes) > 100
