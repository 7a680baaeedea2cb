"""The plug-in for vLLM as far as it goes without vLLM: which pieces a layer is made of, and their product.

What needs vLLM is in bench/engines: vllm_agreement.py, vllm_families.py and vllm_serve.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fracbit.checkpoint.format import StoredLayer, stored_layer, tensor_names
from fracbit.engines.vllm_plugin import ops
from fracbit.engines.vllm_plugin.fused import (
    FusedLayer,
    FusedPiece,
    fused_layer,
    leaves_of,
    piece_names,
    product_of,
)
from fracbit.errors import FormatError
from fracbit.kernels import spec_of
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics import PackedTensor, decode, quantize_tensor
from fracbit.numerics.activations import round_inputs
from fracbit.numerics.packed import parts_of
from fracbit.records.inputs import Inputs
from fracbit.records.scheme import parse_scheme

WIDTH = 96
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
WORDS = (
    "int4z/32",
    "int3/32 out",
    "kmeans4/16",
    "kmeans:row2/row",
    "nf4/64 s=int8:64",
    "int5f/flat:40",
    "int8/tensor",
    "float:e2m14/32",
)


def packed(word: str, rows: int, outliers: int = 0) -> PackedTensor:
    weight = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
    columns = torch.arange(outliers) * 7 if outliers else None
    return quantize_tensor(weight, parse_scheme(word), columns=columns)


def stored(weights: dict[str, PackedTensor]) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    """The layers of a config that hold these weights, and their tensors by name."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors |= tensor_names(name, weight)
    return {name: stored_layer(weight) for name, weight in weights.items()}, tensors


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(0))


def layout(rows: tuple[int, ...] = (64, 32, 32), word: str = "int4z/32") -> FusedLayer:
    layers, _ = stored({f"b.{name}": packed(word, size) for name, size in zip("qkv", rows, strict=True)})
    return fused_layer([f"b.{name}" for name in "qkv"], layers, rows, WIDTH)


def test_a_fused_layer_has_the_names_of_its_pieces() -> None:
    assert piece_names("m.0.qkv_proj", FUSED) == ("m.0.q_proj", "m.0.k_proj", "m.0.v_proj")
    assert piece_names("m.0.o_proj", FUSED) == ("m.0.o_proj",)
    assert piece_names("lm_head", {}) == ("lm_head",)


@pytest.mark.parametrize(
    ("shard", "name"), [("q", "b.q"), ("k", "b.k"), (2, "b.v"), ((1,), "b.k"), ((0,), "b.q")]
)
def test_a_shard_is_a_piece(shard: str | int | tuple[int, ...], name: str) -> None:
    assert layout().piece(shard).name == name


def test_a_layer_that_is_fused_in_the_file_is_one_piece() -> None:
    layers, _ = stored({"b.qkv": packed("int4z/32", 128)})
    found = fused_layer(["b.qkv"], layers, (64, 32, 32), WIDTH)
    assert found.pieces == (FusedPiece("b.qkv", layers["b.qkv"], 0, 128),)
    assert found.piece(None) is found.pieces[0]


def test_several_shards_may_be_one_piece() -> None:
    """Qwen3-Next stores q, k and v as one matrix and z as another, which vLLM counts as four."""
    layers, _ = stored({"b.qkv": packed("int4z/32", 128)})
    found = fused_layer(["b.qkv", "b.z"], layers, (64, 32, 32, 48), WIDTH)
    assert [(piece.first, piece.rows) for piece in found.pieces] == [(0, 128), (128, 48)]
    assert found.piece((0, 1, 2)).name == "b.qkv"
    assert found.piece(3).name == "b.z"


@pytest.mark.parametrize("shard", [None, "x", 3, -1])
def test_a_shard_that_is_no_piece_is_refused(shard: str | int | None) -> None:
    with pytest.raises(FormatError, match=r"b\.q, b\.k, b\.v: vLLM brings shard"):
        layout().piece(shard)


@pytest.mark.parametrize(("parts", "columns"), [((64, 32, 40), WIDTH), ((64, 32, 32), 128)])
def test_pieces_that_do_not_fill_a_layer_are_refused(parts: tuple[int, ...], columns: int) -> None:
    layers, _ = stored(
        {f"b.{name}": packed("int4z/32", rows) for name, rows in (("q", 64), ("k", 32), ("v", 32))}
    )
    with pytest.raises(FormatError, match=r"b\.q \(64, 96\).*config\.json does not belong"):
        fused_layer(list(layers), layers, parts, columns)


def test_every_stored_tensor_has_a_place() -> None:
    weights = {f"b.{number}": packed(word, 48, outliers=3) for number, word in enumerate(WORDS)}
    layers, tensors = stored(weights)
    found = fused_layer(list(layers), layers, [48] * len(WORDS), WIDTH)
    expected = {name.rpartition(".")[2]: tensor.dtype for name, tensor in tensors.items()}
    assert leaves_of(found.pieces, torch.float32).keys() == expected.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outliers", [0, 3])
def test_the_product_is_that_of_the_pieces(outliers: int, dtype: torch.dtype) -> None:
    """Any schemes side by side, and a float piece between them."""
    weights = {f"b.{number}": packed(word, 32 + 8 * number, outliers) for number, word in enumerate(WORDS)}
    layers, tensors = stored(weights)
    floating = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    names = [*list(layers)[:2], "b.float", *list(layers)[2:]]
    parts = [layers[name].shape[0] if name in layers else 24 for name in names]
    found = fused_layer(names, layers, parts, WIDTH)
    product = product_of(found.pieces, tensors | {"b.float.weight": floating})
    x = x_of(2, 5).to(dtype)
    rows = [decode(weights[name]) if name in weights else floating.float() for name in names]
    expected = x.float() @ torch.cat(rows).T  # [2, 5, out]
    y = product(x)
    assert y.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.float(), expected, rtol=close, atol=close * float(expected.abs().max()))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    "inputs", [None, Inputs(), Inputs(scope="tensor", scale=2.5), Inputs("power", 6)], ids=str
)
def test_inputs_are_seen_as_the_checkpoint_says(inputs: Inputs | None, rotated: bool) -> None:
    """As `QuantLinear` sees them, beside a piece that sees them as they are."""
    plain, turned = packed("int4z/32", 40), packed("nf4/32", 24)
    layers, tensors = stored({"b.q": plain, "b.k": turned})
    layers["b.k"] = StoredLayer(turned.scheme, turned.shape, inputs=inputs, rotated=rotated)
    product = product_of(fused_layer(list(layers), layers, (40, 24), WIDTH).pieces, tensors)
    linear = QuantLinear(turned.scheme, turned.shape, inputs=inputs, rotated=rotated)
    linear.fill(turned)
    x = x_of(7)
    y = product(x)
    torch.testing.assert_close(y[:, 40:], linear(x))
    torch.testing.assert_close(y[:, :40], x @ decode(plain).T, rtol=1e-4, atol=1e-4)


def test_pieces_that_see_the_same_share_what_they_see() -> None:
    layers, tensors = stored({f"b.{name}": packed("int4z/32", 32) for name in "qkv"})
    layers = {name: StoredLayer(layer.scheme, layer.shape, inputs=Inputs()) for name, layer in layers.items()}
    product = product_of(fused_layer(list(layers), layers, [32] * 3, WIDTH).pieces, tensors)
    assert len(product.views) == 1
    assert product.seen == (0, 0, 0)


def test_a_missing_tensor_is_named() -> None:
    layers, tensors = stored({"b.q": packed("int4z/32", 32)})
    del tensors["b.q.weight_scales"]
    with pytest.raises(
        FormatError, match=r"layer b\.q: the checkpoint holds no tensor 'b\.q\.weight_scales'"
    ):
        product_of(fused_layer(["b.q"], layers, [32], WIDTH).pieces, tensors)


def test_a_missing_float_piece_is_named() -> None:
    layers, tensors = stored({"b.q": packed("int4z/32", 32)})
    pieces = fused_layer(["b.q", "b.k"], layers, [32, 16], WIDTH).pieces
    with pytest.raises(FormatError, match=r"layer b\.k: the checkpoint holds no tensor 'b\.k\.weight'"):
        product_of(pieces, tensors)
    with pytest.raises(FormatError, match=r"b\.k\.weight has 9 rows, and the layer needs 16"):
        product_of(pieces, tensors | {"b.k.weight": torch.ones(9, WIDTH)})


def test_a_broken_tensor_is_named() -> None:
    layers, tensors = stored({"b.q": packed("int4z/32", 32)})
    tensors["b.q.weight_scales"][3, 0] = torch.nan
    with pytest.raises(FormatError, match=r"layer b\.q: scales holds a value that is not finite"):
        product_of(fused_layer(["b.q"], layers, [32], WIDTH).pieces, tensors)


def test_a_graph_takes_any_number_of_tokens() -> None:
    """A layer is traced once, and vLLM drops the guards: nothing may depend on the number of tokens."""
    layers, tensors = stored({f"b.{name}": packed("int4z/32", 32) for name in "qk"})
    layers["b.k"] = StoredLayer(layers["b.k"].scheme, layers["b.k"].shape, inputs=Inputs(), rotated=True)
    product = product_of(fused_layer(list(layers), layers, [32, 32], WIDTH).pieces, tensors)
    compiled = torch.compile(lambda x: product(x) * 2, backend="aot_eager", fullgraph=True)
    first = x_of(6)
    torch._dynamo.mark_dynamic(first, 0)  # type: ignore[no-untyped-call]  # an error where the trace fixes the size
    for x in (first, x_of(3), x_of(40)):
        torch.testing.assert_close(compiled(x), product(x) * 2)


def test_a_graph_looks_up_any_number_of_rows() -> None:
    table = packed("nf4/32 s=int8:64", 50)
    parts, spec = (
        list(dict(parts_of(table)).values()),
        spec_of(table.scheme, table.shape, dict(parts_of(table))),
    )
    compiled = torch.compile(
        lambda ids: ops.table_rows(ids, parts, spec) + 1, backend="aot_eager", fullgraph=True
    )
    first = torch.tensor([4, 0, 49, 4])
    torch._dynamo.mark_dynamic(first, 0)  # type: ignore[no-untyped-call]
    for ids in (first, torch.arange(9)):
        torch.testing.assert_close(compiled(ids), decode(table)[ids] + 1)


def test_the_operators_are_what_they_say() -> None:
    table = packed("int4z/32", 50)
    parts, spec = (
        list(dict(parts_of(table)).values()),
        spec_of(table.scheme, table.shape, dict(parts_of(table))),
    )
    torch.library.opcheck(ops.table_rows, (torch.tensor([1, 7]), parts, spec))
    torch.library.opcheck(ops.round_inputs, (x_of(3), json.dumps(Inputs().to_json())))
    torch.testing.assert_close(
        ops.round_inputs(x_of(3), json.dumps(Inputs().to_json())), round_inputs(x_of(3), Inputs())
    )


def test_vllm_finds_the_plug_in(root: Path) -> None:
    lines = (
        (root / "pyproject.toml").read_text().partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    )
    assert lines.startswith('fracbit = "fracbit.engines.vllm_plugin:register"\n')


def test_importing_the_plug_in_imports_neither_torch_nor_vllm() -> None:
    program = "import sys, fracbit.engines.vllm_plugin; assert not {'torch', 'vllm', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_registering_makes_the_method_known_to_vllm() -> None:
    if find_spec("vllm") is None:
        pytest.skip(
            "vLLM is not installed; bench/engines/vllm_families.py runs the plug-in in an environment that has it"
        )
    from vllm.model_executor.layers.quantization import get_quantization_config

    from fracbit.engines.vllm_plugin import register

    register()
    register()
    assert get_quantization_config("fracbit").__name__ == "FracbitQuantization"
