"""The tables of everything that has a name, on one page: data types, quantizers, column rules, transforms, scores, ...

A `Table` says where the object of each name lives and imports it when it is asked for. So a recipe or a command line can check
a name, and list all names, without torch. To add an entry, write its file and one line here; the law tests then hold it to the
laws of its kind.

Model families and kernels have tables of their own in their packages: a lookup there needs the objects themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from fracbit.errors import FracbitError, RecipeError, SchemeError, near_matches
from fracbit.records.borrowed import method_hint

T = TypeVar("T")


@dataclass(frozen=True)
class Table(Generic[T]):
    """Names and where their objects live: `entries` maps a name to "module:attribute".

    - `kind`: what a message calls an entry; `written`: how one is asked for; `error`: what an unknown name raises.
    - `reading`: the names here whose objects read text, for an early answer; the objects decide, and a test compares both.

    Iteration, `len` and `in` look at names alone; `table[name]` and `items` import.
    """

    kind: str
    entries: Mapping[str, str]
    error: type[FracbitError] = RecipeError
    written: str = "{}"
    reading: Collection[str] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the page."""
        return tuple(self.entries)

    def check(self, name: str) -> str:
        """The name itself where the table has it; nothing is imported. Raises `error` with near matches."""
        if name not in self.entries:
            hint = elsewhere(name) or method_hint(name)
            raise self.error(f"unknown {self.kind} {name!r}; {hint}{near_matches(name, self.entries)}")
        return name

    def load(self, name: str) -> T:
        """The object called `name`. Raises `error` with near matches."""
        module, _, attribute = self.entries[self.check(name)].partition(":")
        found: T = getattr(import_module(module), attribute)
        return found

    def __getitem__(self, name: str) -> T:
        return self.load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def items(self) -> Iterator[tuple[str, T]]:
        """Every name with its object; imports them all."""
        return ((name, self.load(name)) for name in self.entries)


def elsewhere(name: str) -> str:
    """Where a name belongs that another table has; empty where none does."""
    for table in globals().values():
        if isinstance(table, Table) and name in table:
            return f"it is {'an' if table.kind[0] in 'aeiou' else 'a'} {table.kind}: {table.written.format(name)}; "
    return ""


# Their packages give these tables a type: `fracbit.quantizers.QUANTIZERS` is a `Table[Callable[..., Quantizer]]`.

DATATYPES: Table[Any] = Table(
    "data type",
    {
        "int": "fracbit.numerics.datatypes:INT",
        "float": "fracbit.numerics.datatypes:FLOAT",
        "ocp": "fracbit.numerics.datatypes:OCP_FLOAT",
        "dynamic": "fracbit.numerics.datatypes:DYNAMIC",
        "quantile": "fracbit.numerics.datatypes:QUANTILE",
        "iq": "fracbit.numerics.datatypes:IQ",
        "nf": "fracbit.numerics.datatypes:NORMAL_FLOAT",
        "power": "fracbit.numerics.datatypes:POWER",
        "kmeans": "fracbit.numerics.datatypes:KMEANS",
    },
    SchemeError,
    written="--scheme {}4/64",
)

QUANTIZERS: Table[Any] = Table(
    "quantizer",
    {
        "rtn": "fracbit.quantizers.rtn:RoundToNearest",
        "gptq": "fracbit.quantizers.gptq:Gptq",
        "descent": "fracbit.quantizers.gptq:Descent",
    },
    written="--quantizer {}",
    reading=("gptq", "descent"),
)

COLUMN_RULES: Table[Any] = Table(
    "column rule",
    {
        "cost": "fracbit.quantizers.columns:COST",
        "activation": "fracbit.quantizers.columns:ACTIVATION",
        "proxy": "fracbit.quantizers.columns:PROXY",
        "random": "fracbit.quantizers.columns:RANDOM",
    },
    written="--set outliers={}:0.01",
    reading=("activation",),
)

TRANSFORMS: Table[Any] = Table(
    "transform",
    {
        "smooth": "fracbit.transforms.smooth:SMOOTH",
        "awq": "fracbit.transforms.awq:AWQ",
        "rotate": "fracbit.transforms.rotation:STREAM",
        "rotate-mlp": "fracbit.transforms.rotation:INNER",
    },
    written="--set calibration.transforms={}",
)

CORRECTIONS: Table[Any] = Table(
    "correction",
    {
        "adam": "fracbit.models.tweak:Adam",
        "closed": "fracbit.models.tweak:Closed",
        "auto": "fracbit.models.tweak:Auto",
        "train": "fracbit.models.train:Train",
    },
    written="--set calibration.tweak={}",
)

SCORES: Table[Any] = Table(
    "score",
    {
        "lim": "fracbit.importance.lim:LIM",
        "lim-final-norm": "fracbit.importance.lim:BEHIND_THE_FINAL_NORM",
        "zd": "fracbit.importance.zd:POOLED",
        "zd-two-sided": "fracbit.importance.zd:TWO_SIDED",
        "zd-per-matrix": "fracbit.importance.zd:PER_MATRIX",
        "zd-two-sided-per-matrix": "fracbit.importance.zd:TWO_SIDED_PER_MATRIX",
        "random": "fracbit.importance.chance:RANDOM",
        "first": "fracbit.importance.sequence:FIRST",
        "last": "fracbit.importance.sequence:LAST",
        "weight-error": "fracbit.importance.weight_error:WEIGHT_ERROR",
        "gram-error": "fracbit.importance.gram_error:GRAM_ERROR",
        "guided-error": "fracbit.importance.gram_error:GUIDED_ERROR",
        "gradient": "fracbit.importance.gradient_error:GRADIENT",
        "fisher": "fracbit.importance.gradient_error:FISHER",
        "oracle": "fracbit.importance.oracle:ORACLE",
    },
    written="--score {}",
    reading=("lim", "lim-final-norm", "gram-error", "guided-error", "gradient", "fisher", "oracle"),
)

PERTURBATIONS: Table[Any] = Table(
    "perturbation",
    {
        "gaussian": "fracbit.perturbation.noise:GAUSSIAN",
        "uniform": "fracbit.perturbation.noise:UNIFORM",
        "rademacher": "fracbit.perturbation.noise:RADEMACHER",
        "growing": "fracbit.perturbation.noise:GROWING",
        "growing-scaled": "fracbit.perturbation.noise:GROWING_SCALED",
        "shrinking": "fracbit.perturbation.noise:SHRINKING",
        "shrinking-scaled": "fracbit.perturbation.noise:SHRINKING_SCALED",
    },
    written="fracbit lens --kinds {}",
)

FORMATS: Table[Any] = Table(
    "export format",
    {
        "float": "fracbit.checkpoint.export.float:export_float",
        "compressed-tensors": "fracbit.checkpoint.export.compressed_tensors:export_compressed_tensors",
        "gptq": "fracbit.checkpoint.export.gptq:export_gptq",
        "awq": "fracbit.checkpoint.export.awq:export_awq",
        "mlx": "fracbit.checkpoint.export.mlx:export_mlx",
        "gguf": "fracbit.checkpoint.export.gguf.gguf_file:export_gguf",
    },
    written="fracbit export --to {}",
)

TRACKERS: Table[Any] = Table(
    "tracker",
    {
        "mlflow": "fracbit.sweeps.trackers:mlflow",
        "wandb": "fracbit.sweeps.trackers:wandb",
    },
    written="--track {}",
)

ENGINES: Table[Any] = Table(
    "engine",
    {
        "vllm-cpu": "fracbit.engines.vllm_cpu:VLLM_CPU",
        "vllm": "fracbit.engines.vllm_gpu:VLLM",
        "compressed-tensors": "fracbit.engines.compressed_tensors_alone:COMPRESSED_TENSORS",
        "gptqmodel": "fracbit.engines.gptqmodel:GPTQMODEL",
        "llama.cpp": "fracbit.engines.llama_cpp:LLAMA_CPP",
        "mlx": "fracbit.engines.mlx:MLX",
        "transformers": "fracbit.engines.transformers_alone:TRANSFORMERS",
    },
    written="--for {}",
)

SERVING: Mapping[str, str] = {
    "vllm-cpu": "compressed-tensors",
    "vllm": "compressed-tensors",
    "llama.cpp": "gguf",
    "mlx": "mlx",
}
"""The engines here for which models are quantized, with their usual formats."""

FILES_ONLY = ("compressed-tensors", "gptqmodel", "transformers")
"""The engines here that only read files. As `reading`, both are for an early answer, and the objects decide."""
