"""`make release` refuses what is no release: a version of development, a changelog or files without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("fracbit-1.2.3.tar.gz", "fracbit-1.2.3-cp311-cp311-manylinux_2_28_x86_64.whl")


def checked(place: Path, version: str, changelog: str, made: tuple[str, ...]) -> tuple[int, str]:
    (place / "src/fracbit/records").mkdir(parents=True)
    (place / "dist").mkdir()
    (place / "src/fracbit/records/version.py").write_text(f'__version__ = "{version}"\n')
    (place / "CHANGELOG.md").write_text(changelog)
    for name in made:
        (place / "dist" / name).touch()
    done = subprocess.run(
        [sys.executable, ROOT / ".ci/release", place], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_release_is_ready(tmp_path: Path) -> None:
    assert checked(tmp_path, "1.2.3", "# C\n\n## [1.2.3] - 2026-01-31\n", FILES) == (
        0,
        "ready for `twine upload dist/*`\n",
    )


@pytest.mark.parametrize(
    ("version", "changelog", "made", "said"),
    [
        ("1.2.3.dev0", "## [1.2.3.dev0] - 2026-01-31\n", FILES, "a release has none of .dev"),
        ("1.2.3", "## [Unreleased]\n", FILES, "no heading `## [1.2.3] - DATE`"),
        ("1.2.3", "## [1.2.3] - 2026-01-31\n", FILES[:1], "no manylinux wheel of 1.2.3"),
        (
            "1.2.3",
            "## [1.2.3] - 2026-01-31\n",
            (FILES[1].replace("1.2.3", "1.2.2"), FILES[0]),
            "no manylinux wheel of 1.2.3",
        ),
    ],
)
def test_what_is_no_release_is_refused(
    tmp_path: Path, version: str, changelog: str, made: tuple[str, ...], said: str
) -> None:
    code, shown = checked(tmp_path, version, changelog, made)
    assert code == 1
    assert said in shown


def test_the_script_of_wheels_is_one_that_bash_reads() -> None:
    assert subprocess.run(["bash", "-n", ROOT / ".ci/wheels"], check=False).returncode == 0
