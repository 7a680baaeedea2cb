"""One packed linear on a GPU against its memory bandwidth, and against bitsandbytes, torchao and HQQ where they are installed.

    python bench/kernels/gpu.py [--shapes 4096x4096 ...] [--batches 1 4 16 512] [--json out.json]

Needs a GPU and Triton. NOT RUN YET: no GPU was at hand when this was written, so it has measured nothing and makes no table of
any document. What it is to show: at batch 1 and 4 bits, 4096 x 4096 and larger, at least 75 % of the bandwidth that a plain
read of as many bytes reaches, and less time than each of the others takes for the same shape in the same run.

A product of 8 MB takes less time than Python needs to ask for it. So the calls, over copies of the weight that together exceed
the cache, are recorded in a CUDA graph, and `us` is the time of its replay by the number of calls, the median of some rounds;
`eager_us` is the same without a graph. What cannot be recorded has `us` null. Activations are bfloat16.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import Row, arguments, versions, write_json
from peers.packs import Pack, bitsandbytes_nf4

from fracbit.kernels import PackedLinear, reference
from fracbit.numerics import PackedTensor, quantize_tensor, stored_bits
from fracbit.records.scheme import Scheme

COPIES_BYTES = 400e6  # several times the second-level cache of an H100
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192))
BATCHES = (1, 4, 16, 512)
ROWS = 256  # quantized once and repeated: times do not depend on the values
SCHEMES = (
    Scheme("int", 4, 64), Scheme("nf", 4, 64), Scheme("kmeans", 4, 64),
    Scheme("int", 4, 64, "out"), Scheme("nf", 4, 64, "out"), Scheme("kmeans", 4, 64, "out"),
    Scheme("int", 3, 64), Scheme("int", 2, 64),
)  # fmt: skip

Product = Callable[[Tensor], Tensor]
Maker = Callable[[Tensor], tuple[Product, float]]  # a bfloat16 weight -> a product and the bytes it reads


def own(scheme: Scheme, weight: Tensor) -> tuple[Product, float]:
    packed = repeated(sample(scheme, weight.shape[1]), len(weight) // ROWS).to("cuda")
    return PackedLinear(packed), stored_bits(packed) / 8


@lru_cache
def sample(scheme: Scheme, columns: int) -> PackedTensor:
    return quantize_tensor(torch.randn(ROWS, columns) * 0.02, scheme)


def repeated(packed: PackedTensor, times: int) -> PackedTensor:
    """A weight of `times` as many rows."""
    assert isinstance(packed.scales, Tensor)
    shape = (packed.shape[0] * times, packed.shape[1])
    codes, scales = (part.repeat(times, 1) for part in (packed.codes, packed.scales))
    return replace(packed, shape=shape, codes=codes, scales=scales)


def check(scheme: Scheme) -> None:
    """The kernel against the reference on this GPU, before anything is timed."""
    packed = sample(scheme, 4096).to("cuda")
    for count, dtype, limit in (
        (1, torch.float32, 1e-5),
        (4, torch.bfloat16, 1e-2),
        (32, torch.bfloat16, 1e-2),
    ):
        x = torch.randn(count, 4096, device="cuda", dtype=dtype)
        expected = reference.linear(x, packed).float()
        error = float((PackedLinear(packed)(x).float() - expected).norm() / expected.norm())
        if error > limit:
            sys.exit(f"{scheme} {scheme.axis}, {count} rows of {dtype}: the kernel is off by {error:.1e}")


def plain(weight: Tensor) -> tuple[Product, float]:
    return partial(torch.nn.functional.linear, weight=weight.clone()), weight.numel() * 2


def packed(pack: Pack, weight: Tensor) -> tuple[Product, float]:
    """A linear that another library has packed to 4 bits with a scale of 16 or 32 bits for 64 weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], False, "cuda", torch.bfloat16)
    layer.weight.data = weight.clone()
    holder = nn.Sequential(layer)
    pack(holder)
    return holder[0], weight.numel() * (0.5 + 4 / 64)


def torchao(holder: nn.Sequential) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    quantize_(holder, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))


def hqq(backend: str, holder: nn.Sequential) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    if backend == "gemlite":
        from hqq.backends.gemlite import patch_hqq_to_gemlite as patch
    else:
        from hqq.backends.torchao import patch_hqq_to_aoint4 as patch
    how = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    holder[0] = patch(HQQLinear(holder[0], how, compute_dtype=torch.bfloat16, device="cuda"), None)


OTHERS: dict[str, tuple[Pack, tuple[str, ...]]] = {
    "bitsandbytes nf4/64": (bitsandbytes_nf4, ("bitsandbytes",)),
    "torchao int4/64": (torchao, ("torchao",)),
    "hqq 4/64 tinygemm": (partial(hqq, "tinygemm"), ("hqq",)),
    "hqq 4/64 gemlite": (partial(hqq, "gemlite"), ("hqq", "gemlite")),
}
"""How each packs a linear, and the modules that it needs."""


def makers() -> Iterator[tuple[str, Maker]]:
    yield from ((f"fracbit {scheme} {scheme.axis}", partial(own, scheme)) for scheme in SCHEMES)
    yield "torch bf16", plain
    for name, (pack, needs) in OTHERS.items():
        if all(find_spec(module) for module in needs):
            yield name, partial(packed, pack)


@triton.jit
def _read(words, sums, count, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(words + at, mask=at < count, other=0)))


def reader(size: float) -> Callable[[], object]:
    """A plain read of as many bytes, 16 of them a load."""
    words = torch.zeros(int(size) // 4, dtype=torch.int32, device="cuda")
    programs = triton.cdiv(len(words), 4096)
    sums = torch.empty(programs, dtype=torch.int32, device="cuda")
    return lambda: _read[(programs,)](words, sums, len(words), TILE=4096)


def copier(size: float) -> Callable[[], object]:
    """A copy that reads and writes as many bytes together."""
    words = torch.zeros(int(size) // 8, dtype=torch.int32, device="cuda")
    other = torch.empty_like(words)
    return partial(other.copy_, words)


def recorded(calls: list[Callable[[], object]]) -> Callable[[], object] | None:
    """The calls as one CUDA graph; None for calls that wait for the device, which no graph can hold."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills caches of allocations
        for call in calls[:2] * 2 + calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as error:
        print(f"  not recorded: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None
    return graph.replay


def microseconds(run: Callable[[], object], calls: int, rounds: int) -> float:
    """Median time of one of the `calls` that `run` makes; a first round warms up."""
    times = []
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[1:])


@torch.inference_mode()
def timed(calls: list[Callable[[], object]], rounds: int) -> tuple[float | None, float]:
    """Microseconds of a call: in a graph, and asked for one by one."""
    replay = recorded(calls)
    graph = None if replay is None else microseconds(replay, len(calls), rounds)
    return graph, microseconds(lambda: [call() for call in calls], len(calls), rounds)


def measure(name: str, make: Maker, shape: tuple[int, int], batches: list[int], rounds: int) -> Iterator[Row]:
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
    first, size = make(weight)
    layers = [first, *(make(weight)[0] for _ in range(int(COPIES_BYTES // size)))]
    read, copy = (timed([kind(size) for _ in layers], rounds)[0] for kind in (reader, copier))
    assert read is not None
    for batch in batches:
        x = torch.randn(batch, shape[1], device="cuda", dtype=torch.bfloat16)
        took, eager = timed([partial(layer, x) for layer in layers], rounds)
        yield {
            "name": name, "shape": list(shape), "batch": batch, "bytes": size, "us": took, "eager_us": eager,
            "read_us": read, "copy_us": copy, "GBps": took and size / took / 1e3, "share_of_read": took and read / took,
        }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, rounds=20, shapes=SHAPES, json=None)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; this measures the Triton kernel on one")
    device = torch.cuda.get_device_name()
    print(f"{device}; us in a CUDA graph (one by one), share of a plain read of as many bytes")
    for scheme in SCHEMES:
        check(scheme)
    rows = []
    for shape in given.shapes:
        if shape[0] % ROWS:
            parser.error(f"{shape[0]} rows: {ROWS} must divide them")
        for name, make in makers():
            for row in measure(name, make, shape, given.batches, given.rounds):
                rows.append(row)
                print(line_of(row), flush=True)
    libraries = versions("torch", "triton", "bitsandbytes", "torchao", "hqq", "gemlite")
    write_json(given.json, {"device": device, "libraries": libraries, "rows": rows})


def line_of(row: Row) -> str:
    graph, share = (f"{row['us']:8.1f}", f"{row['share_of_read']:.2f}") if row["us"] else ("       -", "   -")
    shape = "x".join(map(str, row["shape"]))
    start = f"{shape:>12} batch {row['batch']:<4} {row['name']:<26}"
    return f"{start} {graph} ({row['eager_us']:8.1f}) us  {share}"


if __name__ == "__main__":
    main()
