"""The command for an extra works for how fracbit was installed."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from fracbit.records import extras

ORIGINS: tuple[tuple[dict[str, Any] | None, str], ...] = (
    (None, "pip install 'fracbit[eval]'"),
    (
        {"dir_info": {"editable": True}, "url": "file:///a%20b/fracbit"},
        "pip install -e '/a b/fracbit[eval]'",
    ),
    ({"dir_info": {}, "url": "file:///fracbit"}, "pip install 'fracbit[eval] @ file:///fracbit'"),
    (
        {"archive_info": {}, "url": "file:///w/fracbit-0.2-py3-none-any.whl"},
        "pip install 'fracbit[eval] @ file:///w/fracbit-0.2-py3-none-any.whl'",
    ),
    (
        {"vcs_info": {"vcs": "git", "commit_id": "abc"}, "url": "https://example.org/fracbit"},
        "pip install 'fracbit[eval] @ git+https://example.org/fracbit@abc'",
    ),
)
"""What an installer wrote down (PEP 610), and the command."""


@pytest.mark.parametrize(("origin", "command"), ORIGINS)
def test_the_command_fits_the_installation(
    origin: dict[str, Any] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(extras, "distribution", lambda name: Installed())
    assert extras.install("eval") == command


def test_sources_that_were_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    assert extras.install("ray") == "pip install 'fracbit[ray]'"
