"""What ends a command: its exit code and its line."""

from __future__ import annotations

import pytest

from nnunetv2_hiendmae.command import verdict


def raised_while_stopping(first: type[BaseException]) -> BaseException:
    try:
        try:
            raise first
        finally:
            raise RuntimeError("cannot join thread before it is started")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(("first", "code"), [(KeyboardInterrupt, 130), (OSError, 1)])
def test_what_stopping_raises_does_not_hide_ctrl_c(first: type[BaseException], code: int) -> None:
    found, line = verdict(raised_while_stopping(first), "the same command continues")
    assert found == code
    assert line.startswith("interrupted") == (code == 130)
