"""One run without a sweep, in a process of its own: rate.py runs it. It imports no more than such a run needs.

python bench/sweep/plain.py one < RUN.json     loads, quantizes, evaluates; prints the loss
python bench/sweep/plain.py bare < RUN.json    prints the seconds of the evaluation alone
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import SHARED

from fracbit.data import read_documents
from fracbit.evaluation import perplexity
from fracbit.models.blocks import blocks, linears, weight_of
from fracbit.models.find import family_of
from fracbit.models.install import set_weight
from fracbit.numerics import decode, quantize_tensor
from fracbit.records.row import Run


def loaded(one: Run) -> tuple[PreTrainedModel, tuple[torch.Tensor, ...]]:
    """The float model of a run, and its documents."""
    model = AutoModelForCausalLM.from_pretrained(SHARED / one.recipe.model, dtype=torch.float32)
    return model, read_documents(str(SHARED / one.evaluation.text), None, model.config.vocab_size).documents


def whole(one: Run) -> float:
    """One run as anyone would write it: nothing shared, nothing kept."""
    if one.recipe.calibration is not None:
        return calibrated(one)
    model, documents = loaded(one)
    if one.quantized:
        family = family_of(model)
        for _, block in blocks(model, family):
            for linear in linears(block, family).values():
                set_weight(linear, decode(quantize_tensor(weight_of(linear), one.recipe.scheme)))
    return perplexity(model, documents, window=one.evaluation.window).nll


def calibrated(one: Run) -> float:
    """A run that reads calibration data: the checkpoint is written, loaded and evaluated."""
    from fracbit.pipeline.verbs import evaluate, quantize

    assert one.recipe.calibration is not None
    texts = tuple(str(SHARED / text) for text in one.recipe.calibration.texts)
    plan = one.recipe.calibration.model_copy(update={"texts": texts})
    recipe = one.recipe.model_copy(update={"model": str(SHARED / one.recipe.model), "calibration": plan})
    text, window = str(SHARED / one.evaluation.text), one.evaluation.window
    with tempfile.TemporaryDirectory() as folder:
        quantize(recipe, f"{folder}/q", progress=None)
        return evaluate(f"{folder}/q", text, window=window, dtype="float32", progress=None).nll


def bare(one: Run, passes: int = 5) -> dict[str, float]:
    """The evaluation alone, of a model that is loaded and stays as it is: the fastest of some passes."""
    model, documents = loaded(one)
    taken = []
    for _ in range(passes):
        started, cpu = time.perf_counter(), time.process_time()
        perplexity(model, documents, window=one.evaluation.window)
        taken.append((time.perf_counter() - started, time.process_time() - cpu))
    walls, cpus = zip(*taken, strict=True)
    return {"runs": 1, "wall": min(walls), "cpu": min(cpus)}


def main() -> None:
    (task,) = sys.argv[1:]
    one = Run.model_validate_json(sys.stdin.read())
    print(whole(one) if task == "one" else json.dumps(bare(one)))


if __name__ == "__main__":
    main()
