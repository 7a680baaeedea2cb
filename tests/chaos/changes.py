"""Random changes of files: bytes, JSON, TOML, safetensors. Each function changes what is there and says what it did."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

DEEP = 100_000
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**15, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "0", "../up", "/etc/passwd", "x" * 5000, "\u0000", "\ud800", "<!--<script>", "%s{0}$", "cpu", "float32", [], [None], [[]],
    {}, {"x": 1}, [1, 2, 3], ["x"] * 40, {"": None}, "auto", "default", [-1, -1], [0, 0], [2**40, 2**40],
)  # fmt: skip
"""Values that some field somewhere cannot have."""


def any_of(chance: random.Random, folder: Path, names: list[str] | None = None) -> str:
    """Change one file of a folder at random; returns what was done."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and (not names or path.name in names))
    weights = [path for path in files if path.suffix in (".safetensors", ".gguf")]
    path = chance.choice(weights if weights and chance.random() < 0.4 else files)
    return f"{path.name}: {file(chance, path)}"


def file(chance: random.Random, path: Path) -> str:
    """Change a file by what it is: its structure most of the time, else its bytes."""
    kinds: dict[str, Callable[[random.Random, Path], str]] = {".json": fields, ".safetensors": tensors}
    change = kinds.get(path.suffix, raw) if chance.random() < 0.8 else raw
    return change(chance, path)


def raw(chance: random.Random, path: Path) -> str:
    """Change bytes: cut, empty, remove, flip, overwrite, append, repeat."""
    data = bytearray(path.read_bytes())
    how = chance.choice(
        ("cut", "cut", "empty", "remove", "flip", "flip", "flip", "zero", "append", "noise", "folder")
    )
    where = chance.randrange(max(1, len(data)))
    if chance.random() < 0.4:
        where = chance.randrange(max(1, min(200, len(data))))  # headers lie in front
    if how == "remove":
        path.unlink()
        return "removed"
    if how == "folder":
        path.unlink()
        path.mkdir()
        return "a folder of its name"
    if how == "cut":
        data = data[:where]
    elif how == "empty":
        data = bytearray()
    elif how == "flip" and data:
        data[where] ^= 1 << chance.randrange(8)
    elif how == "zero":
        data[where : where + 64] = bytes(len(data[where : where + 64]))
    elif how == "noise":
        data[where : where + 16] = chance.randbytes(len(data[where : where + 16]))
    elif how == "append":
        data += chance.randbytes(chance.randrange(1, 64))
    path.write_bytes(data)
    return f"{how} at {where}"


def fields(chance: random.Random, path: Path) -> str:
    """Change a value, a key or the depth of a JSON file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return raw(chance, path)
    if chance.random() < 0.03:
        text, said = deep(chance)
        path.write_text(text)
        return said
    tree, said = value(chance, tree)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return said


def deep(chance: random.Random) -> tuple[str, str]:
    """A JSON text that is too deep, and its description."""
    opened, closed = chance.choice((("[", "]"), ('{"a":', "}")))
    text = opened * DEEP + ("1" + closed * DEEP if chance.random() < 0.5 else "")
    return (f'{{"model_type": {text}}}' if chance.random() < 0.5 else text), f"{DEEP} times {opened}"


def value(chance: random.Random, tree: Any) -> tuple[Any, str]:
    """A tree with one change, and its description; the tree is changed in place below its root."""
    path: list[Any] = []
    holder = tree
    while isinstance(holder, dict | list) and holder:
        key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        path.append(key)
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.2:
            break
        holder = inner
    if not path:
        other = chance.choice(HOSTILE)
        return other, f"the whole is {other!r:.60}"
    where = ".".join(map(str, path))
    if chance.random() < 0.15:
        del holder[path[-1]]
        return tree, f"without {where}"
    if isinstance(holder, dict) and chance.random() < 0.05:
        holder[chance.choice(("x", "", "quantization_config", "auto_map", "layers"))] = chance.choice(HOSTILE)
        return tree, f"another key beside {where}"
    other = chance.choice(HOSTILE)
    old = holder[path[-1]]
    if isinstance(old, int | float) and chance.random() < 0.4:
        other = chance.choice((old + 1, old - 1, old * 2, -old, str(old), [old], old / 2, float(old)))
    holder[path[-1]] = other
    return tree, f"{where} = {other!r:.60}"


def tensors(chance: random.Random, path: Path) -> str:
    """Remove, rename, cut, turn or cast a tensor of a safetensors file, or put numbers in that do not belong."""
    try:
        held = load_file(path)
    except (SafetensorError, OSError):
        return raw(chance, path)
    if not held:
        return raw(chance, path)
    name, other = chance.choice(sorted(held)), chance.choice(sorted(held))
    tensor = held[name]
    how = chance.choice(("remove", "rename", "foreign", "swap", "numbers", *SHAPES))
    if how in ("remove", "rename"):
        del held[name]
    if how == "rename":
        held[name + chance.choice(("x", ".weight", "_", "\u00e9", "/.."))] = tensor
    elif how == "foreign":
        held[chance.choice(("x", "model.layers.9.x.weight", f"{name}_scale_inv", f"{name}_absmax"))] = (
            torch.ones(3)
        )
    elif how == "swap":
        held[name], held[other] = held[other], tensor
    elif how != "remove":
        held[name] = _numbers(chance, tensor) if how == "numbers" else SHAPES[how](chance, tensor)
    save_file({key: each.contiguous().clone() for key, each in held.items()}, path, metadata={"format": "pt"})
    return f"{name}: {how}"


CASTS = (
    torch.float64, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.float16, torch.uint8, torch.complex64,
)  # fmt: skip
SHAPES: dict[str, Callable[[random.Random, torch.Tensor], torch.Tensor]] = {
    "cut": lambda chance, tensor: tensor[:-1] if tensor.dim() and len(tensor) else tensor,
    "turn": lambda chance, tensor: tensor.T if tensor.dim() == 2 else tensor[None],
    "cast": lambda chance, tensor: tensor.float().to(chance.choice(CASTS)),
    "empty": lambda chance, tensor: tensor.new_empty(chance.choice(((0,), (0, 0), (0, *tensor.shape[1:])))),
    "scalar": lambda chance, tensor: tensor.flatten()[0].clone() if tensor.numel() else tensor,
    "stretch": lambda chance, tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor[None],
}


def _numbers(chance: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which some numbers are others."""
    changed = tensor.clone()
    flat = changed.view(-1)
    if not len(flat):
        return changed
    where = chance.randrange(len(flat))
    if changed.is_floating_point():
        flat[where] = chance.choice((float("nan"), float("inf"), -float("inf"), 1e30, -1.0, 0.0))
    elif changed.dtype == torch.bool:
        flat[where] = ~flat[where]
    else:
        limits = torch.iinfo(changed.dtype)
        flat[where] = chance.choice((limits.min, limits.max, 0))
    if chance.random() < 0.3:
        flat[:] = flat[where].clone()
    return changed


def text(chance: random.Random, data: str) -> tuple[str, str]:
    """A text file of settings with one change of its characters or lines, and what it was."""
    lines = data.splitlines()
    number = chance.randrange(len(lines))
    how = chance.choice(
        ("drop", "twice", "hostile", "hostile", "hostile", "hostile", "cut", "noise", "deep", "key")
    )
    if how == "drop":
        del lines[number]
    elif how == "twice":
        lines.insert(number, lines[number])
    elif how == "hostile":
        setting = [at for at, line in enumerate(lines) if " = " in line]
        number = chance.choice(setting)
        lines[number] = lines[number].partition(" = ")[0] + " = " + toml_value(chance)
    elif how == "key":
        lines.insert(
            number,
            chance.choice(("x", "scheme", "model", "[calibration]", "[[overrides]]", "bits", "a.b.c"))
            + " = 1",
        )
    elif how == "deep":
        lines.append("x = " + "[" * DEEP + "]" * DEEP)
    joined = "\n".join(lines) + "\n"
    if how == "cut":
        joined = joined[: chance.randrange(len(joined))]
    elif how == "noise":
        where = chance.randrange(len(joined))
        joined = (
            joined[:where]
            + chance.choice(("\x00", "\ufeff", '"""', "=", "[", "\u202e", "\n\n"))
            + joined[where + 1 :]
        )
    return joined, f"line {number + 1} {how}: {lines[min(number, len(lines) - 1)] if lines else '':.60}"


def toml_value(chance: random.Random) -> str:
    """A value as TOML writes it."""
    other = chance.choice([each for each in HOSTILE if each is not None and each != "\ud800"])
    if (isinstance(other, float) and other != other) or other == float("inf"):
        return chance.choice(("nan", "inf", "-inf"))
    if isinstance(other, dict):
        return "{ x = 1 }"
    return json.dumps(other).replace("null", '"x"')
