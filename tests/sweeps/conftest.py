"""A model, a text and a grid that are small enough to sweep in a test; a PostgreSQL server of the tests' own."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from families import tiny_llama
from texts import write_ids

GRID = """
models = ["tiny"]
[evaluation]
text = "ids.u16?length=32"
[calibration]
text = "ids.u16?length=32"
samples = 4
length = 16
[[arm]]
dtypes = ["int", "nf"]
bits = [2, 3, 4]
blocks = [16, "flat:16"]
"""


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with a model `tiny`, token ids, and `grid.toml` (13 runs)."""
    model = tiny_llama(**SIZES, max_position_embeddings=64, tie_word_embeddings=True)
    model.bfloat16().save_pretrained(tmp_path / "tiny")
    write_ids(tmp_path / "ids.u16", 6, 32, 64)
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path


@pytest.fixture
def postgresql(postgresql_server: str) -> str:
    """The URL of an empty PostgreSQL database."""
    import psycopg

    with psycopg.connect(postgresql_server) as link:
        link.execute("DROP SCHEMA public CASCADE")
        link.execute("CREATE SCHEMA public")
    return postgresql_server


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a private server, which listens on a socket in a folder of its own and nowhere else."""
    pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg: pip install 'fracbit[postgresql]'")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    programs = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))
    if programs is None:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    user = _server_user()
    folder = Path(tempfile.mkdtemp(prefix="fracbit-"))  # outside of pytest: a socket's path must be short
    shutil.chown(folder, user)
    run = {"user": user, "check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
    control = [str(Path(programs).with_name("pg_ctl")), "-D", str(folder / "data"), "-w"]
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
    try:
        subprocess.run([programs, "-D", str(folder / "data"), "-U", "study", "-A", "trust", "-N"], **run)
        subprocess.run([*control, "-o", options, "-l", str(folder / "log"), "start"], **run)
        try:
            yield f"postgresql://study@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **run)
    finally:
        shutil.rmtree(folder)


def _server_user() -> str:
    """A PostgreSQL server refuses to run as root: another user of this machine does it then."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)
