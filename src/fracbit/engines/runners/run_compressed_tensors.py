"""Runs in an environment of compressed-tensors: what it decodes from every layer of an export."""

import json
from pathlib import Path

import compressed_tensors
import torch
from answer import answer, asked, hashed
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open


def main():
    """Decode layer by layer; the model is never built."""
    given = asked()
    folder = Path(given.export)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    places = {name: path for path in sorted(folder.glob("*.safetensors")) for name in names_in(path)}
    weights = {}
    for group in settings["config_groups"].values():
        scheme = QuantizationScheme(**group)
        reader = BaseCompressor.get_value_from_registry(group["format"])
        for layer in group["targets"]:
            stored = {
                name.removeprefix(f"{layer}."): read(path, name)
                for name, path in places.items()
                if name.startswith(f"{layer}.weight")
            }
            weight = reader.decompress(stored, scheme)["weight"]
            weights[layer] = {
                "dtype": str(weight.dtype).removeprefix("torch."),
                "sha256": hashed(weight.float().numpy()),
            }
    versions = {"compressed-tensors": compressed_tensors.__version__, "torch": torch.__version__}
    answer(given.out, versions, weights=weights)


def names_in(path):
    """The names of a file's tensors."""
    with safe_open(path, "pt") as file:
        return list(file.keys())


def read(path, name):
    """One tensor."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


if __name__ == "__main__":
    main()
