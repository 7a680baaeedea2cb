"""Runs in the environment of MLX: what it predicts for given ids, and what its weights are."""

import mlx.core as mx
import mlx_lm
import numpy
from answer import answer, asked, hashed
from mlx_lm.generate import generate_step


def main():
    """Load the export as mlx-lm does, and compute in the type that is asked for."""
    given = asked()
    model, _ = mlx_lm.load(given.export)
    model.set_dtype(getattr(mx, given.dtype))
    weights = {
        name: {"dtype": given.dtype, "sha256": hashed(decoded(module))}
        for name, module in model.named_modules()
        if "scales" in module
    }
    logits = numpy.array(model(mx.array(given.ids)).astype(mx.float32))[:, :-1]
    greedy = []
    for row in given.ids:
        steps = generate_step(mx.array(row), model, max_tokens=given.greedy)
        greedy.append([int(token) for token, _ in steps])
    versions = {"mlx": mx.__version__, "mlx-lm": mlx_lm.__version__}
    answer(given.out, versions, logits=logits, greedy=numpy.array(greedy), weights=weights)


def decoded(module):
    """The weight [out, in] of a quantized module, by MLX itself."""
    how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return numpy.array(
        mx.dequantize(module.weight, module.scales, module.get("biases"), **how).astype(mx.float32)
    )


if __name__ == "__main__":
    main()
