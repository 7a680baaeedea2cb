"""A sample of the types that `make coverage` takes through fracbit, one of each kind of architecture, and the check itself."""

from __future__ import annotations

from pathlib import Path

import check
import page
import pytest
import survey
import tiny
import torch
from torch import nn

from fracbit.numerics import decode, quantize_tensor

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of types that are not ours to mend

SAMPLE = {
    "causal:gpt2": 1.0,  # transposed linears
    "causal:bart": 1.0,  # the decoder of an encoder-decoder
    "causal:roberta": 1.0,  # an encoder that learned to write
    "causal:deepseek_v3": 0.99,  # latent attention, groups of experts
    "causal:gpt_oss": 0.95,  # experts with biases, gate and up interleaved
    "causal:dbrx": 0.99,  # experts in matrices of two dimensions
    "causal:qwen3_next": 0.96,  # linear attention, experts
    "causal:nemotron_h": 0.85,  # blocks of four kinds; a state space that reads a weight itself
    "causal:gemma4_text": 0.99,  # embeddings in every block, heads of two sizes
    "image:llava": 1.0,  # a text model within another
    "image:llama4": 0.98,  # the same with transposed experts, and a class for text alone
    "image:qwen2_vl": 1.0,  # positions in three axes
    "multimodal:voxtral": 1.0,  # sound
}
"""Types and the share of their blocks' matrices that must become smaller."""


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_type_of_transformers(kind: str, tmp_path: Path) -> None:
    row = check.check(kind, tmp_path)
    assert row.float == ""
    assert (str(row.rtn), str(row.gptq)) == ("ok", "ok")
    for step in (row.cached, row.uncached, row.causal):
        assert step.verdict in ("ok", "none", "float cannot"), step
    assert row.share >= SAMPLE[kind], row.left
    assert row.outside == []


def test_every_name_has_a_config_or_a_reason() -> None:
    """Types come from transformers' tables, so a new version of it is asked as a whole; names of corrections are real."""
    kinds = tiny.all_types()
    assert len(kinds) == len(set(kinds)) > 250
    names = {kind.partition(":")[2] for kind in kinds}
    assert set(tiny.EXTRA) <= names
    assert set(tiny.INPUTS) <= names


@pytest.mark.parametrize(
    "lie", ["whole", "turned", "expert", "turned expert", "half", "odd", "rows of all", "columns of all"]
)
def test_a_matrix_is_found_wherever_it_lies(lie: str) -> None:
    torch.manual_seed(0)
    stacks = {
        "whole": torch.randn(8, 16),
        "turned": torch.randn(16, 8),
        "expert": torch.randn(3, 8, 16),
        "turned expert": torch.randn(3, 16, 8),
        "half": torch.randn(3, 16, 16),
        "odd": torch.randn(3, 16, 16),
        "rows of all": torch.randn(24, 16),
        "columns of all": torch.randn(48, 8),
    }
    twin = nn.Module()
    twin.stack = nn.Parameter(stacks[lie])
    held = twin.stack.data
    wanted = {
        "whole": lambda: held,
        "turned": lambda: held.T,
        "expert": lambda: held[2],
        "turned expert": lambda: held[2].T,
        "half": lambda: held[2, 8:],
        "odd": lambda: held[2, 1::2],
        "rows of all": lambda: held[16:],
        "columns of all": lambda: held[32:].T,
    }[lie]()
    parameter, view = check.nearest("any.name", wanted + 0.05 * torch.randn(8, 16), twin, 0.25)
    assert parameter is twin.stack
    assert torch.equal(view, wanted)
    with pytest.raises(check.Wrong, match="near no weights"):
        check.nearest("any.name", torch.randn(8, 16), twin, 0.25)


def test_rounded_weights_of_another_place_are_wrong() -> None:
    """Near is not enough for rounding, which has one right answer."""
    torch.manual_seed(0)
    weight = torch.randn(8, 32)
    rounded = decode(quantize_tensor(weight, check.SCHEME))
    check.check_rounded("a", rounded, weight)
    with pytest.raises(check.Wrong, match="are not its float weights rounded"):
        check.check_rounded("a", 1.02 * rounded, weight)


def test_summary_and_page_name_every_type() -> None:
    fine = check.Row(
        "causal:one", "OneForCausalLM", rtn=check.Outcome("ok"), gptq=check.Outcome("refused", "no a|b")
    )
    fine.share, fine.left = (
        0.5,
        [("model.layers.0.mixer.out_proj.weight", 4, "linear"), ("model.layers.0.g.weight", 2, "router")],
    )
    fine.notes = ["Found so. Float (the model's code reads its weight): mixer.out_proj."]
    absent = check.Row("image:two", float="ImportError: needs three")
    rows = [
        fine.to_json(),
        absent.to_json(),
        {"kind": "causal:four", "float": "", "rtn": {"verdict": "error", "said": "died"}},
    ]
    said = survey.summary(rows)
    assert "[1] no a|b\n     causal:one" in said
    assert "needs three\n     image:two" in said
    assert "[1] died\n     causal:four" in said
    text = page.page(rows, "5", "int4z/16", 1e-4)
    assert (
        "| `one` | OneForCausalLM | 50.0 %* | `mixer.out_proj` (the model's code reads its weight); "
        "routers (they choose experts) | yes | refused: no a\\|b |"
    ) in text
    assert "| `image:two` | ImportError: needs three |" in text
    assert "| `four` |  |  |  | error: died | none |" in text
