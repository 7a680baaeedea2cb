"""Checkpoints in the formats of other programs: tiny models written from known codes, and the same models as plain floats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outputs import manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fracbit.checkpoint.source import Source

Packed = tuple[dict[str, "Tensor"], "Tensor"]
"""What is stored of a weight, by name, and the weight that it stands for."""

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "vocab_size": 96,
}
"""Of a Llama whose widths most block sizes divide."""


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a checkpoint is the weight of a linear of the blocks."""
    return tensor.dim() == 2 and name.endswith(".weight") and (".layers." in name or ".h." in name)


def two_folders(
    model: Any,
    where: Path,
    pack: Callable[[str, Tensor], Packed],
    settings: Mapping[str, Any] | None,
    *,
    dtype: torch.dtype | None = None,
    kept: Sequence[str] = (),
    key: str = "quantization_config",
    which: Callable[[str, Tensor], bool] = is_linear,
) -> tuple[Path, Path]:
    """A folder with every linear of the blocks, or `which` say so, as `pack` stores it, and one with what these stand for.

    `kept`: endings of names that stay as they are in both; `settings`: under `key` of the first config, None: none.
    """
    from safetensors.torch import load_file, save_file

    coded, plain = where / "coded", where / "plain"
    model = model if dtype is None else model.to(dtype)
    model.save_pretrained(plain)
    state = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if which(name, tensor) and not name.endswith(tuple(kept)):
            parts, value = pack(name, tensor)
            stored |= parts
            values[name] = value
        else:
            stored[name] = values[name] = tensor
    model.save_pretrained(coded)
    config = json.loads((plain / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, **({key: settings} if settings else {})}))
    for folder, tensors in ((coded, stored), (plain, values)):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return coded, plain


def check_read(coded: Path | str, plain: Path | str) -> Source:
    """Whole tensors, rows, columns and pieces of a decoded checkpoint are those of the plain one. Returns it, opened."""
    import torch

    from fracbit.checkpoint.opened import open_float
    from fracbit.checkpoint.source import content, open_source, read_rows, read_tensor, tensor_pieces

    found, wanted = open_float(coded).source, open_source(str(plain))
    assert set(found.tensors) == set(wanted.tensors)
    for name, info in wanted.tensors.items():
        whole = read_tensor(wanted, name)
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (info.dtype, info.shape), name
        read = read_tensor(found, name)
        assert read.dtype == whole.dtype
        assert torch.equal(read, whole), f"{name}: {(read.float() - whole.float()).abs().max()}"
        assert b"".join(tensor_pieces(found, name)) == bytes(content(whole)), name
        if whole.dim() < 2:
            continue
        size = len(whole)
        rows = [slice(0, 1), slice(size // 3, min(size, size // 3 + 5)), slice(max(0, size - 3), size)]
        assert torch.equal(read_rows(found, name, rows), torch.cat([whole[some] for some in rows])), name
        if whole.dim() == 2:
            assert torch.equal(read_rows(found, name, [slice(3, 17)], axis=1), whole[:, 3:17]), name
    assert found.decoded
    assert found.bytes == wanted.bytes
    return found


def check_quantized(
    coded: Path | str, plain: Path | str, where: Path, scheme: str = "int4/64"
) -> dict[str, Any]:
    """Quantizing a decoded checkpoint gives the bytes that quantizing the plain one gives. Returns its manifest."""
    import fracbit

    made = fracbit.quantize(coded, where / "from-coded", scheme, progress=None)
    fracbit.quantize(plain, where / "from-plain", scheme, progress=None)
    first, second = manifest(where / "from-coded"), manifest(where / "from-plain")
    assert {name: entry["sha256"] for name, entry in first["tensors"].items()} == {
        name: entry["sha256"] for name, entry in second["tensors"].items()
    }
    assert first["source"]["sha256"] == second["source"]["sha256"]
    assert first["source"]["decoded"]
    assert any("rounded before" in note for note in made.notes)
    assert any("rounded before" in note for note in first["notes"])
    config = json.loads((where / "from-coded" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fracbit"
    fracbit.load(where / "from-coded")
    return first


def change_config(folder: Path, **changes: Any) -> None:
    """Change entries of the quantization_config of a folder; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    settings = {**config["quantization_config"], **changes}
    config["quantization_config"] = {name: value for name, value in settings.items() if value is not None}
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stream_of(codes: Tensor, bits: int) -> Tensor:
    """Words int32 [rows, n] of codes [rows, count]: each row one number of many bits, its first code lowest."""
    import numpy as np
    import torch

    size = -(-codes.shape[1] * bits // 32) * 4
    rows = []
    for row in codes.tolist():
        number = sum(int(code) << (index * bits) for index, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(size, "little"), dtype="<i4").copy())
    return torch.from_numpy(np.stack(rows))


def rounded_groups(weight: Tensor, bits: int, group: int, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. 2^bits - 1 of a weight [out, in], scales and zero points [out, groups], by groups of columns."""
    import torch

    parts = weight.float().split(group, 1)
    low = torch.stack(
        [part.amin(1) if asymmetric else -part.abs().amax(1) for part in parts], 1
    )  # [out, groups]
    high = torch.stack([part.amax(1) if asymmetric else part.abs().amax(1) for part in parts], 1)
    scale = ((high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)).clamp(min=1e-4).to(weight.dtype)
    zero = (-low.clamp(max=0) / scale.float()).round().clamp(0, 2**bits - 1)
    zero = zero if asymmetric else torch.full_like(zero, 2 ** (bits - 1))
    index = torch.arange(weight.shape[1]) // group
    codes = (weight.float() / scale.float()[:, index] + zero[:, index]).round().clamp(0, 2**bits - 1).abs()
    return codes, scale, zero
