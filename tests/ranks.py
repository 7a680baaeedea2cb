"""What every rank does in tests/pipeline/test_ranks.py: `torchrun ranks.py CASES FOLDER`.

CASES is JSON, a recipe by name, each for a folder of its own; `average_bits` of a case is a budget.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import fracbit
from fracbit.checkpoint.output import Output
from fracbit.errors import FracbitError
from fracbit.pipeline.quantize.ranks import joined
from fracbit.records.recipe import Recipe
from fracbit.records.spending import Spending


def quantize(case: dict[str, Any], output: Path, resume: bool = False) -> None:
    """Quantize as a case says."""
    words = dict(case)
    bits = words.pop("average_bits", None)
    spending = None if bits is None else Spending(average_bits=bits, score="gram-error")
    fracbit.quantize(Recipe(**words), output, spending=spending, resume=resume, progress=None)


def main() -> None:
    """All cases with one group of ranks. `dies`: rank 1 is killed at its first shard; `differs`: it has another seed."""
    cases, folder, *fault = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *sys.argv[3:]
    try:
        with joined() as ranks:
            if "dies" in fault and ranks.number == 1:
                Output.write_shard = _die  # type: ignore[method-assign]
            for name, case in cases.items():
                other = {"seed": 1} if "differs" in fault and ranks.number == 1 else {}
                quantize({**case, **other}, folder / name)
    except FracbitError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
