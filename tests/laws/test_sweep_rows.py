"""The law of one core: a row of a sweep equals quantize and evaluate of the same recipe, to the last digit.

Same type (float32), batch, threads and text. Over every quantizer, correction, transform, column rule and chain, in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fracbit
from fracbit.records.recipe import Recipe, make_recipe
from fracbit.records.row import KEEP_ALL, Evaluation, Run
from fracbit.records.tables import COLUMN_RULES, CORRECTIONS, QUANTIZERS, TRANSFORMS
from fracbit.sweeps.queue import workload_of
from fracbit.sweeps.workbench import Workbench
from texts import write_ids

TEXT = "ids.u16?length=32"
EVALUATION = Evaluation(text=TEXT)
INT3 = {"dtype": "int", "bits": 3, "block": 16, "offset": "zero"}


def calibrated(**settings: Any) -> dict[str, Any]:
    return {"calibration": {"texts": [TEXT], "samples": 4, "length": 16, **settings}}


CASES: dict[str, dict[str, Any]] = {
    "float": {"overrides": [KEEP_ALL.model_dump()]},
    "searched": {"search": True},
    "double quantization": {"scheme": {"dtype": "nf", "bits": 4, "block": 16, "scale": "int8:16"}},
    "fitted along out": {"scheme": {"dtype": "kmeans", "bits": 3, "block": 16, "axis": "out"}},
    "embeddings": {"embeddings": {"dtype": "int", "bits": 8, "block": 16}},
    "kept layers": {"overrides": [{"layers": "*.mlp.*", "keep": True}]},
    "axes by trial": {"quantizer": "gptq", **calibrated(axis="gptq", chain="float")},
    "in order": {"quantizer": "gptq", **calibrated(sequential=True)},
    "rounded inputs": {"quantizer": "gptq", **calibrated(inputs="int8/tensor")},
    "distilled": {"quantizer": "gptq", **calibrated(distill=1, dtype="float32")},
    **{f"quantizer {name}": {"quantizer": name, **calibrated()} for name in QUANTIZERS},
    **{
        f"quantizer {name}, float chain": {"quantizer": name, **calibrated(chain="float")}
        for name in QUANTIZERS
    },
    # Where the source is read in the type of the forward passes, nothing may write into what runs share.
    **{
        f"{chain} chain in {dtype}": {
            "quantizer": "gptq",
            **calibrated(chain=chain, tweak="auto", dtype=dtype),
        }
        for chain in ("quantized", "float")
        for dtype in ("bfloat16", "float32")
    },
    **{f"correction {name}": {"quantizer": "gptq", **calibrated(tweak=name)} for name in CORRECTIONS},
    **{
        f"correction {name}, float chain": {"quantizer": "gptq", **calibrated(tweak=name, chain="float")}
        for name in CORRECTIONS
    },
    "trained by one sample, float chain": {
        "quantizer": "gptq",
        **calibrated(tweak="train:tokens=16", chain="float"),
    },
    **{f"transform {name}": {"quantizer": "gptq", **calibrated(transforms=[name])} for name in TRANSFORMS},
    **{
        f"columns by {name}": {"outliers": f"{name}:0.1", **(calibrated() if name == "activation" else {})}
        for name in COLUMN_RULES
    },
    **{
        f"columns by {name}, gptq": {"quantizer": "gptq", "outliers": f"{name}:0.1", **calibrated()}
        for name in COLUMN_RULES
    },
}


def recipe(model: str, root: Path | None, settings: dict[str, Any], seed: int = 0) -> Recipe:
    """The recipe as a sweep below a root writes it, or with `root` as a person writes it elsewhere."""
    made = make_recipe({"model": model, "scheme": INT3, "seed": seed, **settings})
    if root is None or made.calibration is None:
        return made
    there = made.calibration.model_copy(update={"texts": (f"{root / TEXT}",)})
    return made.model_copy(update={"calibration": there})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "tiny")
    write_ids(root / "ids.u16", 8, 32, 64)
    return root


@pytest.fixture(scope="module")
def bench(study: Path) -> Workbench:
    run = Run(recipe=recipe("tiny", None, {}), evaluation=EVALUATION)
    return Workbench(workload_of(run), study)


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_what_quantize_and_evaluate_give(
    study: Path, bench: Workbench, tmp_path: Path, name: str
) -> None:
    run = Run(recipe=recipe("tiny", None, CASES[name]), evaluation=EVALUATION)
    row = bench.measure(run)
    assert row.error is None
    made = fracbit.quantize(recipe(str(study / "tiny"), study, CASES[name]), tmp_path / "q")
    found = fracbit.evaluate(tmp_path / "q", study / TEXT, against=study / "tiny", dtype="float32")
    assert row.nll == found.nll, "to the last digit"
    assert found.divergence is not None
    assert row.divergence == found.divergence.kl
    assert row.agreement == found.divergence.agreement
    assert row.bits_per_weight == made.bits_per_weight
    assert row.bits_per_parameter == made.bits_per_parameter
    assert {*made.notes} <= {*row.notes}, "what a run has to say is in its row"


def test_runs_leave_no_trace_on_each_other(study: Path, bench: Workbench) -> None:
    """Whatever was measured before, a run gives what a new workbench gives, and the float model comes back bit for bit."""
    runs = [Run(recipe=recipe("tiny", None, settings), evaluation=EVALUATION) for settings in CASES.values()]
    state = {name: tensor.clone() for name, tensor in bench.floats.model.state_dict().items()}
    backwards = [bench.measure(run).nll for run in reversed(runs)]
    after = bench.floats.model.state_dict()
    assert state.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in state.items())
    fresh = Workbench(bench.workload, study)
    assert [fresh.measure(run).nll for run in runs] == backwards[::-1]


def test_the_seed_of_a_run_draws_its_samples(study: Path, bench: Workbench) -> None:
    """Three seeds are three calibrations; data-free rounding has nothing to draw."""
    settings = {"quantizer": "gptq", **calibrated()}
    runs = [Run(recipe=recipe("tiny", None, settings, seed), evaluation=EVALUATION) for seed in (0, 1, 2)]
    assert len({bench.measure(run).nll for run in runs}) == 3
    plain = [Run(recipe=recipe("tiny", None, {}, seed), evaluation=EVALUATION) for seed in (0, 1)]
    assert len({bench.measure(run).nll for run in plain}) == 1
