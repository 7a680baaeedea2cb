"""Run the commands of docs/tutorial.md in order, and write what they print into the page.

    python bench/tutorial.py            # run, and replace the output blocks
    python bench/tutorial.py --check    # run, and change nothing; exit code 1 when a command fails

Blocks marked `bash` and `python` are run in a new folder. A `text` block after one of them is its output.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/tutorial.md"
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$\n*", re.MULTILINE | re.DOTALL)
MARK = "-- end of block --"
SETUP = """set -euo pipefail
fracbit() { "$PYTHON" -m fracbit "$@"; }
python() { "$PYTHON" "$@"; }
"""


def script(blocks: list[tuple[str, str]]) -> str:
    """One shell script of all blocks, which prints a mark after each; so a variable of one is known to the next."""
    parts = [SETUP]
    for language, body in blocks:
        parts.append(f"python - <<'PROGRAM'\n{body}PROGRAM\n" if language == "python" else body)
        parts.append(f"echo '{MARK}'\n")
    return "".join(parts)


def outputs(blocks: list[tuple[str, str]]) -> list[str]:
    """What each block prints to stdout. Raises `CalledProcessError` when a command fails; stderr is not kept."""
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": paths,
        "COLUMNS": "110",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["bash", "-c", script(blocks)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return done.stdout.split(f"{MARK}\n")[:-1]


def refreshed(page: str) -> str:
    """The page with the output of each block that has one, as it is today."""
    found = outputs([(m[1], m[2]) for m in BLOCK.finditer(page) if m[1] != "text"])
    current = iter(found)
    last = ""

    def replace(match: re.Match[str]) -> str:
        nonlocal last
        if match[1] != "text":
            last = next(current)
            return match[0]
        ending = match[0][match[0].rindex("```") + 3 :]
        lines = "".join(f"{line.rstrip()}\n" for line in last.strip("\n").splitlines())
        return f"```text\n{lines}```{ending}"

    return BLOCK.sub(replace, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="run the commands and change nothing")
    check = parser.parse_args().check
    try:
        page = refreshed(PAGE.read_text())
    except subprocess.CalledProcessError as error:
        sys.exit(f"a command of {PAGE.name} failed with exit code {error.returncode}; its error is above")
    if not check:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
