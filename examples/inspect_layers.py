"""Look at every layer: how important two scores call it, and what rounding to 3 bits does to it.

python examples/inspect_layers.py
"""

import fracbit
from fracbit.bundled import bundled_model
from fracbit.checkpoint.source import open_source, read_tensor
from fracbit.quantizers import quantizer

# How often the columns of a block exceed one standard deviation, and how much its output differs from its input.
zd = fracbit.score(bundled_model(), "zd")
lim = fracbit.score(
    bundled_model(), "lim", text="bundled:train?documents=each&first=60", samples=16, length=256
)
for block in zd.values:
    print(f"{block:16} ZD {zd.values[block]:8.4f}   LIM {lim.values[block]:8.4f}")

round_to_nearest = quantizer("rtn")
scheme = fracbit.Scheme(bits=3, block=64, offset="zero")
source = open_source(str(bundled_model()))
for name in sorted(source.tensors):
    if name.endswith("proj.weight"):
        weight = read_tensor(source, name).float()  # [out, in]
        found = round_to_nearest(weight, scheme)
        print(f"{name:40} {tuple(weight.shape)!s:10} relative error {found.loss:.4f}")
