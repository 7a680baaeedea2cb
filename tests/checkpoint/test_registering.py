"""fracbit registers with transformers while that may still be loading: no order of imports may break either."""

from __future__ import annotations

import subprocess
import sys

import pytest

ORDERS = (
    "import fracbit; from transformers import PreTrainedModel",
    "import transformers, fracbit; from transformers import modeling_utils",
    "import fracbit.checkpoint.hf; from transformers import AutoModelForCausalLM",
)


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports_works(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", order], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
