"""How to install an extra of fracbit, by how fracbit itself was installed. Torch-free."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fracbit.errors import FracbitError, RecipeError


def check_extra(what: str, module: str, extra: str, error: type[FracbitError] = RecipeError) -> None:
    """Raise `error` where `module`, which `what` needs, is not installed: with the command that installs it."""
    name = module.partition(".")[0]
    found = sys.modules[name] if name in sys.modules else find_spec(name)
    if found is None:
        raise error(f"{what} needs {name}, which is not installed: {install(extra)}")


def install(extra: str) -> str:
    """The command that adds `extra`: for an editable clone, a file, folder or repository, or an index."""
    facts = _origin()
    url = str(facts.get("url", ""))
    if facts.get("dir_info", {}).get("editable"):
        return f"pip install -e '{url2pathname(urlsplit(url).path)}[{extra}]'"
    if "vcs_info" in facts:
        url = f"{facts['vcs_info']['vcs']}+{url}@{facts['vcs_info']['commit_id']}"
    if facts.get("subdirectory"):
        url += f"#subdirectory={facts['subdirectory']}"
    return f"pip install 'fracbit[{extra}] @ {url}'" if url else f"pip install 'fracbit[{extra}]'"


def origin() -> str:
    """How fracbit was installed, without the place: editable, from a repository, from a file or from an index."""
    facts = _origin()
    if facts.get("dir_info", {}).get("editable"):
        return "editable"
    if "vcs_info" in facts:
        return f"from {facts['vcs_info']['vcs']}, commit {facts['vcs_info']['commit_id']}"
    return "from a file or folder" if facts else "from an index, or not installed"


def _origin() -> dict[str, Any]:
    """What the installer wrote down of where fracbit came from (PEP 610); nothing for one from an index."""
    try:
        text = distribution("fracbit").read_text("direct_url.json")
    except PackageNotFoundError:  # sources on PYTHONPATH
        return {}
    found: dict[str, Any] = json.loads(text) if text else {}
    return found
