"""One type of model through fracbit: quantized, loaded, compared with the float model that has the decoded weights.

Where a decoded matrix belongs in the float model is found by its values alone: the place whose weights are nearest. So
neither names nor the splitting of experts can hide a mistake, and what was quantized is counted without asking fracbit.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import fracbit
from fracbit.checkpoint.load import load
from fracbit.errors import FracbitError
from fracbit.numerics import decode, quantize_tensor
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme, parse_scheme

SCHEME: Scheme = parse_scheme("int4z/16")
TOLERANCE = 1e-4
"""Of logits, relative to the largest: what kernels may differ from the reference (1e-5), through a few layers."""
MOVED = 1e-5
"""The same, of a single weight, to see whether the tokens of a model hang on that."""
NEAR = {"rtn": 0.25, "gptq": 0.7}
"""How far a quantized matrix may be from its float one, relative; others are 1.4 away."""
LENGTH, SAMPLES, NEW = 12, 8, 4

Verdict = Literal["ok", "refused", "error", "WRONG", "float cannot", "none"]


@dataclass
class Outcome:
    """How a step ended: `refused` with a `FracbitError`, `error` with another, `WRONG` in silence, `float cannot` itself."""

    verdict: Verdict = "none"
    said: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.said}" if self.said else self.verdict


@dataclass
class Row:
    """All that was found of one type.

    - `float`: "" where transformers can build, save, load and run it, else why not; `needs`: inputs that it cannot run without,
      besides ids.
    - `apart`: the largest difference of logits after rounding.
    - `share`: of the weights of the blocks' matrices, those that became smaller; `full_share`: at the type's default size.
    - `left`: the matrices that did not (name, weights, what it is); `outside`: what became smaller beside the blocks.
    """

    kind: str
    model: str = ""
    float: str = ""
    weights: int = 0
    rtn: Outcome = field(default_factory=Outcome)
    causal: Outcome = field(default_factory=Outcome)
    cached: Outcome = field(default_factory=Outcome)
    uncached: Outcome = field(default_factory=Outcome)
    gptq: Outcome = field(default_factory=Outcome)
    apart: float = 0.0
    share: float = 0.0
    full_share: float | None = None
    left: list[tuple[str, int, str]] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


class Wrong(Exception):
    """fracbit said nothing, and the result cannot be used."""


def check(kind: str, folder: Path, gptq: bool = True) -> Row:
    """Take one type through everything, in the empty `folder`."""
    began, row = time.perf_counter(), Row(kind)
    try:
        inputs = tiny.inputs_of(kind, length=LENGTH)
        row.needs = sorted({"input_ids", *inputs} - {"input_ids"})
        model = _float_model(kind, folder / "float", inputs, row)
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is why the type cannot be built
        row.float = _line(error)
    else:
        row.weights = sum(parameter.numel() for parameter in model.parameters())
        row.rtn = _tried(lambda: _rounded(kind, folder, inputs, row))
        if gptq:
            row.gptq = _tried(lambda: _calibrated(kind, folder, inputs))
    row.seconds = round(time.perf_counter() - began, 2)
    return row


# --- the steps -------------------------------------------------------------------------------------------------------


def _float_model(kind: str, folder: Path, inputs: dict[str, torch.Tensor], row: Row) -> PreTrainedModel:
    """The tiny model, saved, loaded and run by transformers alone."""
    made = tiny.model_of(kind)
    row.model = type(made).__name__
    before = logits(made, inputs)
    if not torch.isfinite(before).all():
        raise ValueError("logits are not finite")
    made.save_pretrained(folder)
    again = _loaded(tiny.auto_of(kind), folder, whole=True)
    if apart(logits(again, inputs), before) > TOLERANCE:
        raise ValueError("transformers itself gives other logits after saving and loading")
    return made


def _rounded(kind: str, folder: Path, inputs: dict[str, torch.Tensor], row: Row) -> Outcome:
    result = fracbit.quantize(str(folder / "float"), folder / "rtn", SCHEME, progress=None)
    row.notes = list(result.notes)
    auto = tiny.auto_of(kind)
    with _loading():
        made = _loaded(auto, folder / "rtn")
        direct = load(folder / "rtn", "float32")
    twin = _loaded(auto, folder / "float")
    written = place(made, twin, NEAR["rtn"])
    row.share, row.left, row.outside = counted(twin, written)
    row.full_share = full_share(kind, row.left)
    if row.share == 0:
        raise Wrong(f"no matrix of the text model's blocks became smaller, but {row.outside[0]} did")
    found, wanted = logits(made, inputs), logits(twin, inputs)
    row.apart = apart(found, wanted)
    _compare(row.apart, "logits")
    if type(direct) is not type(made) or apart(logits(direct, inputs), found) > TOLERANCE:
        raise Wrong(f"fracbit.load gives a {type(direct).__name__} with other logits")
    row.causal = _tried(lambda: _as_causal(kind, folder, inputs["input_ids"]))
    row.cached = _tried(lambda: _generated(made, twin, inputs, True))
    row.uncached = _tried(lambda: _generated(made, twin, inputs, False))
    return Outcome("ok")


def _as_causal(kind: str, folder: Path, ids: torch.Tensor) -> Outcome:
    """The same folder as a text model, where transformers has one for this config."""
    if kind.startswith("causal:"):
        return Outcome("none")
    try:
        twin = _loaded(AutoModelForCausalLM, folder / "float", whole=True)
        logits(twin, {"input_ids": ids})
    except Exception as error:  # noqa: BLE001 - whatever transformers raises
        return Outcome("float cannot", _line(error))
    with _loading():
        made = _loaded(AutoModelForCausalLM, folder / "rtn")
    place(made, twin, NEAR["rtn"])
    _compare(
        apart(logits(made, {"input_ids": ids}), logits(twin, {"input_ids": ids})), "logits of the text model"
    )
    return Outcome("ok")


def _generated(
    made: PreTrainedModel, twin: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: bool
) -> Outcome:
    """The same tokens as the float model with the decoded weights."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": cache}
    try:
        wanted = _written(twin, given | how)
    except Exception as error:  # noqa: BLE001 - whatever transformers raises
        return Outcome("float cannot", _line(error))
    if torch.equal(_written(made, given | how), wanted):
        return Outcome("ok")
    if not torch.equal(
        _written(_moved(twin), given | how), wanted
    ):  # DiffusionGemma draws whole blocks of tokens
        return Outcome("float cannot", f"its own tokens change when its weights move by {MOVED:.0e}")
    raise Wrong(f"generates other tokens {'with' if cache else 'without'} cache")


def _moved(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights are off by less than kernels differ."""
    copy, generator = deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(1 + MOVED * torch.randn(parameter.shape, generator=generator))
    return copy


def _written(model: PreTrainedModel, how: dict[str, Any]) -> torch.Tensor:
    """Ids that a model writes, [samples, length]."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = model.generate(**how)
    return made if isinstance(made, torch.Tensor) else made.sequences  # type: ignore[no-any-return]


def _calibrated(kind: str, folder: Path, inputs: dict[str, torch.Tensor]) -> Outcome:
    ids = folder / "ids.npy"
    numbers = np.random.default_rng(0).integers(4, tiny.FIRST_SPECIAL, (SAMPLES, 2 * LENGTH))
    np.save(ids, numbers.astype(np.uint16))
    plan = Calibration(texts=(str(ids),), samples=SAMPLES, length=2 * LENGTH, batch=4)
    recipe = Recipe(model=str(folder / "float"), scheme=SCHEME, quantizer="gptq", calibration=plan)
    fracbit.quantize(recipe, folder / "gptq", progress=None)
    with _loading():
        made = _loaded(tiny.auto_of(kind), folder / "gptq")
    twin = _loaded(tiny.auto_of(kind), folder / "float")
    place(made, twin, NEAR["gptq"])
    found = logits(made, inputs)
    if not torch.isfinite(found).all():
        raise Wrong("logits of GPTQ are not finite")
    _compare(apart(found, logits(twin, inputs)), "logits of GPTQ")
    return Outcome("ok")


class _loading:
    """A checkpoint that fracbit wrote without a word must load: whatever it raises is `Wrong`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise Wrong(f"cannot be loaded: {_line(error)}") from error


def _compare(distance: float, what: str) -> None:
    if not distance <= TOLERANCE:
        raise Wrong(f"{what} are {distance:.1e} from those of the decoded weights")


def _tried(step: Callable[[], Outcome]) -> Outcome:
    try:
        return step()
    except FracbitError as error:
        return Outcome("refused", _line(error))
    except Wrong as error:
        return Outcome("WRONG", _line(error))
    except Exception as error:  # noqa: BLE001 - a bug of ours, whatever it is
        return Outcome("error", f"{_line(error)} [{_place_of(error)}]")


def _line(error: BaseException) -> str:
    """The error on one line."""
    said = re.sub(
        r"/\S*/(float|rtn|gptq|ids)\b", r"\1", " ".join(str(error).split())
    )  # folders differ every time
    name = type(error).__name__
    return said[:300] if isinstance(error, (FracbitError, Wrong)) else f"{name}: {said[:300]}"


def _place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/fracbit/" in frame.filename] or frames
    last = ours[-1]
    return f"{Path(last.filename).name}:{last.lineno} {last.name}"


# --- models ----------------------------------------------------------------------------------------------------------


def _loaded(auto: Any, folder: Path, whole: bool = False) -> PreTrainedModel:
    """The model in eval mode. `whole`: raises `ValueError` where transformers leaves tensors as they were drawn."""
    found: tuple[PreTrainedModel, dict[str, Any]] = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    missing = found[1]["missing_keys"]
    if whole and missing:
        raise ValueError(
            f"transformers itself finds no weights for {len(missing)} tensors, such as {min(missing)}"
        )
    return found[0].eval()


def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a forward pass, [samples, length, vocabulary]."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some models draw what they start from
        found = model(**inputs).logits
    assert isinstance(found, torch.Tensor)
    return found.float()


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit; infinite where a value is not a number."""
    if found.shape != wanted.shape:
        return float("inf")
    distance = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    return distance if distance == distance else float("inf")


def place(made: PreTrainedModel, twin: PreTrainedModel, near: float) -> dict[int, torch.Tensor]:
    """Write every decoded matrix of `made` into the float model `twin`, where the weights are nearest.

    Returns masks of what was written, by the id of the parameter. Raises `Wrong` where a matrix has no place, or is not what
    rounding gives there.
    """
    packed = {name: module.packed for name, module in made.named_modules() if hasattr(type(module), "packed")}
    if not packed:
        raise Wrong("nothing is quantized in the model that was loaded")
    masks: dict[int, torch.Tensor] = {}
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, stored in packed.items():
        matrix = decode(stored)
        parameter, view = nearest(name, matrix, twin, near)
        if near == NEAR["rtn"]:
            check_rounded(name, matrix, view)
        found.append((matrix, view))
        mask = masks.setdefault(id(parameter), torch.zeros_like(parameter, dtype=torch.bool))
        mask.as_strided(view.shape, view.stride(), view.storage_offset() - parameter.storage_offset()).fill_(
            True
        )
    for matrix, view in found:  # when all are found: a shared matrix is looked for twice
        view.copy_(matrix)
    return masks


def check_rounded(name: str, matrix: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises `Wrong` unless the decoded matrix is the float weight rounded."""
    rounded = decode(quantize_tensor(weight.contiguous(), SCHEME))
    if not torch.allclose(matrix, rounded, rtol=1e-5, atol=1e-6):
        raise Wrong(f"the weights of {name} are not its float weights rounded")


def nearest(
    name: str, matrix: torch.Tensor, twin: nn.Module, near: float
) -> tuple[nn.Parameter, torch.Tensor]:
    """The parameter with the nearest weights, and the view of it; looked for in the smallest module that is called so."""
    path, best = name, float("inf")
    while True:
        module = _submodule(twin, path)
        held: tuple[nn.Parameter, torch.Tensor] | None = None
        for parameter in module.parameters() if module is not None else ():
            for view in _views(parameter.data, matrix.shape):
                distance = float((matrix - view).norm() / view.norm().clamp(min=1e-12))
                if distance < best:
                    best, held = distance, (parameter, view)
        if held is not None and best < near:
            return held
        if not path:
            raise Wrong(f"{name} {tuple(matrix.shape)} is near no weights of the float model ({best:.2f})")
        path = path.rpartition(".")[0]


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _views(tensor: torch.Tensor, shape: torch.Size) -> Iterator[torch.Tensor]:
    """Every way in which a matrix [out, in] may lie in a parameter: whole, turned, one expert's, a part, every n-th row."""
    if tensor.dim() > 3 or (tensor.dim() == 3 and 1 in tensor.shape[1:]):
        tensor = tensor.squeeze()
    stack = list(tensor) if tensor.dim() == 3 else [tensor] if tensor.dim() == 2 else []
    for matrix in stack:
        for turned in (matrix, matrix.T):
            yield from _parts(turned, shape[0], shape[1])
            if turned.shape[1] != shape[1]:  # parts side by side
                yield from (part.T for part in _parts(turned.T, shape[1], shape[0]))


def _parts(matrix: torch.Tensor, rows: int, columns: int) -> Iterator[torch.Tensor]:
    """The parts [rows, columns] of a matrix: one after the other, and every n-th row."""
    if matrix.shape[1] != columns or matrix.shape[0] % rows:
        return
    parts = matrix.shape[0] // rows
    yield from (matrix[part * rows : (part + 1) * rows] for part in range(parts))
    if parts > 1:
        yield from (matrix[part::parts] for part in range(parts))


# --- what became smaller ---------------------------------------------------------------------------------------------


TOWER = re.compile(
    r"(^|[._])(vision|visual|image|images|audio|speech|video|sam|vq\w*|vqmodel|codec\w*|projector|connector|resampler|qformer"
    r"|aligner|talker|token2wav|code2wav|depth_decoder|acoustic\w*|semantic\w*|embed_vision|embed_audio|perceiver\w*)([._]|$)"
)


def counted(
    model: PreTrainedModel, written: dict[int, torch.Tensor]
) -> tuple[float, list[tuple[str, int, str]], list[str]]:
    """The share of the weights of the blocks' matrices that was written; what was not: name, weights, what it is; and what was
    written elsewhere.
    """
    inside = dict(_matrices(model))
    tied = {id(parameter) for parameter, _ in inside.values()}
    total = sum(parameter.numel() for parameter, _ in inside.values())
    smaller = 0
    left: list[tuple[str, int, str]] = []
    for name, (parameter, owner) in inside.items():
        mask = written.get(id(parameter))
        done = 0 if mask is None else int(mask.sum())
        smaller += done
        if done < parameter.numel():
            what = "part" if done else what_is(name, parameter, owner)
            left.append((name, parameter.numel() - done, what))
    outside = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in written and id(parameter) not in tied
    ]
    return (smaller / total if total else 0.0), left, outside


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, tuple[nn.Parameter, nn.Module]]]:
    """Parameters of two and more dimensions in the blocks (all lists of modules) of the part that reads text."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    prefix = f"{path}." if any(name.startswith(f"{path}.") for name in lists) else ""
    seen = set[int]()  # a tied one may have its first name elsewhere (DiffusionGemma)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        within = name.startswith(prefix) and any(name.startswith(f"{each}.") for each in lists)
        taken = id(parameter) in seen or TOWER.search(name.removeprefix(prefix))
        if within and parameter.dim() > 1 and not taken:
            seen.add(id(parameter))
            yield name, (parameter, owner)


def full_share(kind: str, left: list[tuple[str, int, str]]) -> float | None:
    """The share at the type's own default size, where the same matrices stay float; None where that cannot be built.

    The model is on the meta device and costs no memory. A matrix of which a part is left counts as smaller.
    """
    try:
        with torch.device("meta"):
            model = tiny.auto_of(kind).from_config(tiny.full_config(kind), dtype=torch.float32)
        sizes = {name: parameter.numel() for name, (parameter, _) in _matrices(model)}
    except Exception:  # noqa: BLE001 - some types have defaults that do not fit each other
        return None
    alike = {_without_numbers(name) for name, _, what in left if what != "part"}
    floats = sum(size for name, size in sizes.items() if _without_numbers(name) in alike)
    return 1 - floats / sum(sizes.values()) if sizes else None


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def what_is(name: str, parameter: torch.Tensor, owner: nn.Module) -> str:
    """In one or two words, what a parameter does that stayed float."""
    leaf = name.rpartition(".")[2]
    kind = type(owner).__name__
    if re.search(r"Conv\d+d", kind) or "conv" in leaf or "conv" in kind.lower():
        return "convolution"
    if isinstance(owner, nn.Embedding):
        return "table of rows"
    if re.search(r"router|TopK|Gate$", kind) or re.search(
        r"\b(router|gate|wg)\b", name.rpartition(".")[0].rpartition(".")[2]
    ):
        return "router"
    if isinstance(owner, nn.Linear):
        return "one output" if parameter.shape[0] == 1 else "linear"
    if parameter.dim() == 3 and "expert" in kind.lower():
        return f"experts of {kind}"
    return f"{leaf} of {kind}"
