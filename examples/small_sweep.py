"""Measure eight schemes on the bundled model and print their table, best perplexity first.

Every run becomes a row of the store. Start the sweep again and nothing is measured twice.

    python examples/small_sweep.py
"""

import tempfile
from pathlib import Path

import fracbit
from fracbit.sweeps.store import open_store

SWEEP = """
models = ["bundled"]
[evaluation]
text = "bundled:held-out?keep=4096"
[[arm]]                               # the product of these lists: four schemes ...
dtypes = ["int", "nf"]
bits = [3, 4]
[[arm]]                               # ... and four more
bits = [3, 4]
blocks = [32, 64]
offsets = ["zero"]
"""

with tempfile.TemporaryDirectory() as folder:
    (file := Path(folder) / "sweep.toml").write_text(SWEEP)
    outcome = fracbit.sweep(file, f"{folder}/sweep.db")
    print(f"{outcome.measured} runs measured in {outcome.seconds:.0f} s")
    with open_store(f"{folder}/sweep.db") as store:
        rows = sorted(store.rows("done"), key=lambda row: row.nll)
    for row in rows:
        print(f"{row.run!s:24} {row.bits_per_parameter:6.3f} bits, perplexity {row.perplexity:8.2f}")
