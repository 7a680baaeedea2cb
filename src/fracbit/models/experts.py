"""Mixtures of experts as linears: the fused tensors of a block are split into one small MLP per expert.

transformers 5 stores the experts of a block in tensors such as `gate_up_proj [experts, 2 inner, width]` and `down_proj
[experts, width, inner]`, and multiplies them in one grouped product. Quantizing needs each expert's own matrix and its own
inputs (the tokens routed to it), so the module is replaced by one that has the same inputs and the same output and holds
linears named `<n>.gate_proj`, `<n>.up_proj`, `<n>.down_proj`, which are also the names on disk of Qwen's and most other
mixtures. How a family lays its experts out (transposed, interleaved, with biases, in two dimensions) is a `Layout`: a table
that says where in which tensor each linear lies.

Ref: transformers 5, integrations/moe.py (the reference loop over experts).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fracbit.models.install import replace as put
from fracbit.models.quant_linear import QuantLinear, is_plain, through_each

TOGETHER = 2048
"""Rows that several experts are given at once: more take memory, and no time is saved."""
Half: TypeAlias = Literal["first", "second", "even", "odd"]
"""Rows of a matrix that holds two: the first or last half, or every second row from 0 or 1."""


@dataclass(frozen=True)
class Cut:
    """Where the matrix [out, in] of one expert lies in a tensor of all.

    `transposed`: it holds [in, out]. `flat`: it is a matrix [experts x rows, columns] instead of [experts, rows, columns].
    """

    expert: int
    experts: int
    half: Half | None = None
    transposed: bool = False
    flat: bool = False

    def read(self, tensor: Tensor) -> Tensor:
        """The part of the tensor [experts, ...] that this is, a view: [out, in], or [out] of a bias."""
        stack = tensor.view(self.experts, -1, tensor.shape[-1]) if self.flat else tensor
        part = stack[self.expert]  # [out, in], [in, out] or [out]
        part = part.T if self.transposed and part.dim() == 2 else part
        if self.half in ("first", "second"):
            return part.chunk(2)[0 if self.half == "first" else 1]
        return part if self.half is None else part[0 if self.half == "even" else 1 :: 2]

    def write(self, tensor: Tensor, part: Tensor) -> None:
        """Put the matrix into the tensor of all, in place."""
        self.read(tensor).copy_(part)


@dataclass(frozen=True)
class Slot:
    """The tensor that holds a linear's weight (or bias) for all experts, and how it lies there."""

    tensor: str
    half: Half | None = None
    transposed: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Layout:
    """Where the linears of every expert lie, by their names: weights, and biases where there are some.

    `call` says how the module is called: `routed` (states, chosen experts, their shares), `every` (all experts on states in
    their order: Llama 4), `summed` (all experts on all states, with shares: Inkling's shared ones), `sorted` (states sorted by
    expert and the number of each: JetMoE, whose experts are one linear, here named "").
    """

    weights: Mapping[str, Slot]
    biases: Mapping[str, Slot]
    call: Literal["routed", "every", "summed", "sorted"] = "routed"

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Those of all linears, weights first."""
        return (*self.weights.values(), *self.biases.values())

    def cuts(self, experts: int) -> Iterator[tuple[str, str, Cut]]:
        """Names below the mixture (`3.up_proj.weight`), the fused tensors that hold them, and where: expert by expert."""
        for expert in range(experts):
            for leaf, slots in (("weight", self.weights), ("bias", self.biases)):
                for linear, slot in slots.items():
                    name = ".".join(part for part in (str(expert), linear, leaf) if part)
                    yield (
                        name,
                        slot.tensor,
                        Cut(expert, experts, slot.half, transposed=slot.transposed, flat=slot.flat),
                    )


def _slots(
    gate: bool, transposed: bool = False, interleaved: bool = False, suffix: str = ""
) -> dict[str, Slot]:
    halves: tuple[Half, Half] = ("even", "odd") if interleaved else ("first", "second")
    down = {"down_proj": Slot(f"down_proj{suffix}", None, transposed)}
    if not gate:
        return {"up_proj": Slot(f"up_proj{suffix}", None, transposed)} | down
    fused = f"gate_up_proj{suffix}"
    return {
        "gate_proj": Slot(fused, halves[0], transposed),
        "up_proj": Slot(fused, halves[1], transposed),
    } | down


OTHERS: Mapping[str, Layout] = {
    "Llama4TextExperts": Layout(_slots(True, transposed=True), {}, "every"),
    "Step3p7Experts": Layout(_slots(True), {}),
    "LongcatFlashExperts": Layout(_slots(True), {}),
    "DbrxExperts": Layout(
        {
            "gate_proj": Slot("mlp.w1", flat=True),
            "up_proj": Slot("mlp.v1", flat=True),
            "down_proj": Slot("mlp.w2", transposed=True, flat=True),
        },
        {},
    ),
    "JetMoeParallelExperts": Layout({"": Slot("weight")}, {}, "sorted"),
    "InklingSharedExperts": Layout(
        {name: Slot(name) for name in ("gate_proj", "up_proj", "down_proj")}, {}, "summed"
    ),
}
"""Mixtures of transformers that do not say themselves how they lie, by class."""


def layout_of(module: Any) -> Layout | None:
    """How a fused mixture lies; None for other modules, and for mixtures with tensors that no layout knows."""
    kind = type(module).__name__
    if isinstance(module, SplitExperts):
        return None
    own = {name for name, tensor in module.named_parameters() if tensor.dim() > 1}
    if kind in OTHERS:
        layout = OTHERS[kind]
    elif all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
        # What the decorator of transformers says of a class.
        lie = {"gate": module.has_gate, "transposed": module.is_transposed}
        lie["interleaved"] = not module.is_concatenated
        layout = Layout(_slots(**lie), _slots(**lie, suffix="_bias") if module.has_bias else {})
    else:
        return None
    return layout if own == {slot.tensor for slot in layout.slots} else None


class Gate:
    """What stands between an expert's first linears and its last: the fused module's own gate and activation."""

    def __init__(self, fused: nn.Module, interleaved: bool) -> None:
        """`fused` without its tensors."""
        self.fused, self.interleaved = fused, interleaved
        own = getattr(getattr(type(fused), "_apply_gate", None), "__name__", "_default_apply_gate")
        self.usual = own == "_default_apply_gate"

    def __call__(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """The input of the last linear [tokens, inner] from the outputs of the first ones."""
        fused: Any = self.fused
        if gate is not None and not self.usual:
            both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
            return fused._apply_gate(both)  # type: ignore[no-any-return]
        act = fused.act_fn if hasattr(fused, "act_fn") else fused.mlp.activation_fn  # DBRX's
        return act(up) if gate is None else act(gate) * up  # type: ignore[no-any-return]


class Expert(nn.Module):
    """One expert: `down(gate(up(x), gate(x)))`, x [tokens, width]."""

    def __init__(self, linears: Mapping[str, nn.Linear], gate: Callable[..., Tensor]) -> None:
        """`linears` by name: gate_proj where there is one, up_proj, down_proj."""
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.__dict__["between"] = gate

    def forward(self, x: Tensor) -> Tensor:
        """One expert's output [tokens, width] for x [tokens, width]."""
        return self.get_submodule("down_proj")(self.inner(x))  # type: ignore[no-any-return]

    def inner(self, x: Tensor) -> Tensor:
        """The input of the last linear, [tokens, inner]."""
        parts = dict(self.named_children())
        gate = parts["gate_proj"](x) if "gate_proj" in parts else None  # [tokens, inner]
        return self.__dict__["between"](parts["up_proj"](x), gate)  # type: ignore[no-any-return]


class SplitExperts(nn.Module):
    """The experts of one block by number, called as the fused module is."""

    def __init__(
        self, experts: Sequence[nn.Module], layout: Layout, fused: nn.Module, shapes: Mapping[str, torch.Size]
    ) -> None:
        """`fused`: the module that this one replaces, without its tensors, which had these `shapes`."""
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        for name, module in fused.named_children():  # such as a norm after the experts
            if any(True for _ in module.parameters()):
                self.add_module(name, module)
        self.layout, self.count, self.shapes = layout, len(experts), dict(shapes)
        self.__dict__["fused"] = fused  # not a child: its parts have no names of their own

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> nn.Module:
        return self.get_submodule(str(number))

    def __getattr__(self, name: str) -> Any:
        """What blocks read of the fused module, such as the number of experts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "fused" not in self.__dict__:
                raise
            return getattr(self.__dict__["fused"], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the fused module for its arguments."""
        call: Callable[..., Tensor] = getattr(self, f"_{self.layout.call}")
        return call(x, *args, *kwargs.values())

    def _routed(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The mixed output [..., width] for x [..., width]; chosen experts by number and their shares [tokens, top]."""
        flat = x.reshape(-1, x.shape[-1])  # [tokens, width]
        total = torch.zeros_like(flat)  # [tokens, width]
        order = chosen.flatten().argsort(stable=True)  # [tokens * top], places by expert
        numbers, counts = torch.unique(chosen, return_counts=True)
        places = iter(order.split(counts.tolist()))
        for run in _in_runs(numbers.tolist(), counts.tolist(), TOGETHER):
            place, sizes = torch.cat([next(places) for _ in run]), [size for _, size in run]  # [routed]
            token = place // chosen.shape[1]  # [routed]
            part = self._mixed([number for number, _ in run], flat[token], sizes)
            part = (part * shares.flatten()[place, None]).to(total.dtype)  # [routed, width]
            # Expert by expert: in one sum a token would come several times, in an order that is not fixed.
            for tokens, own in zip(token.split(sizes), part.split(sizes), strict=True):
                total.index_add_(0, tokens, own)
        return total.view(x.shape)

    def _mixed(self, numbers: Sequence[int], rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """What stands for each of `numbers` gives for the next of `sizes` rows [routed, width]: experts, and places beyond."""
        experts = sum(number < self.count for number in numbers)
        own = sum(sizes[:experts])
        part = self._through(numbers[:experts], rows[:own], sizes[:experts]) if experts else rows[:0]
        if own < len(rows):  # LongCat's tokens that need no expert, and places that route nowhere
            idle = rows[own:] if hasattr(self.fused, "identity_expert") else torch.zeros_like(rows[own:])
            part = torch.cat([part, idle])  # [routed, width]
        return self.post_expert_norm(part) if getattr(self.fused, "has_post_expert_norm", False) else part

    def _through(self, numbers: Sequence[int], rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Output [n, out] of experts for the next of `sizes` rows [n, in] each; packed ones of one shape in a call for all."""
        experts = [self[number] for number in numbers]
        linears = [_plain_linears(expert) for expert in experts]
        if len(experts) == 1 or not all(linears):
            parts = rows.split(list(sizes))
            return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
        each = {name: [found[name] for found in linears] for name in linears[0]}
        if "" in each:
            return through_each(each[""], rows, sizes)
        gate = through_each(each["gate_proj"], rows, sizes) if "gate_proj" in each else None  # [n, inner]
        inner = experts[0].__dict__["between"](through_each(each["up_proj"], rows, sizes), gate)  # [n, inner]
        return through_each(each["down_proj"], inner, sizes)

    def _every(self, x: Tensor) -> Tensor:
        """Output [experts x tokens, width] for the states of every expert in order, x of the same shape."""
        return self._through(range(self.count), x, [len(x) // self.count] * self.count)

    def _summed(self, x: Tensor, shares: Tensor) -> Tensor:
        """Sum of all experts on x [..., width], their inner states times `shares` [..., experts]."""
        flat, shares = x.reshape(-1, x.shape[-1]), shares.reshape(-1, self.count, 1)  # [tokens, experts, 1]
        total = torch.zeros_like(flat, dtype=torch.float32)  # [tokens, width]
        for number in range(self.count):
            expert: Any = self[number]
            total += expert.down_proj(expert.inner(flat) * shares[:, number]).float()
        return total.to(x.dtype).view(x.shape)

    def _sorted(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Output [tokens, out] for x [tokens, in], sorted by expert, `sizes` of them for each."""
        return self._through(range(self.count), x, sizes)


def _in_runs(numbers: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """Runs of experts, each with its number and how many rows it has: `most` rows in all, or one expert."""
    run: list[tuple[int, int]] = []
    for number, size in zip(numbers, sizes, strict=True):
        if run and sum(each for _, each in run) + size > most:
            yield run
            run = []
        run.append((number, size))
    if run:
        yield run


def _plain_linears(expert: nn.Module) -> dict[str, QuantLinear]:
    """The packed linears of an expert by name ("" where it is one), if it does nothing but call them; empty otherwise."""
    linears = {"": expert} if isinstance(expert, QuantLinear) else dict(expert.named_children())
    watched = expert._forward_pre_hooks or expert._forward_hooks or "forward" in vars(expert)
    if watched or not all(is_plain(module) for module in linears.values()):
        return {}
    return {name: module for name, module in linears.items() if isinstance(module, QuantLinear)}


def split_experts(model: nn.Module) -> list[str]:
    """Replace every fused mixture in the model, in place, by `SplitExperts`; works on the meta device too.

    Returns the paths that were split, empty for a dense model. A mixture of no known layout is left as it is and stays float.
    """
    paths = [path for path, module in model.named_modules() if layout_of(module) is not None]
    for path in paths:  # by path: no more than one mixture may be in memory twice
        put(model, path, _split(model.get_submodule(path)))
    _tie(model)
    return paths


def parts_of(model: nn.Module) -> dict[str, dict[str, Cut]]:
    """For every fused tensor of a mixture that was split: the model's tensors that it holds, and where."""
    found: dict[str, dict[str, Cut]] = defaultdict(dict)
    for path, module in model.named_modules():
        if isinstance(module, SplitExperts):
            for name, fused, cut in module.layout.cuts(len(module)):
                found[f"{path}.{fused}"][f"{path}.{name}"] = cut
    return dict(found)


def _tie(model: Any) -> None:
    """Tie the parts of fused tensors that were tied (DiffusionGemma's encoder has the experts of its decoder)."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parts = parts_of(model)
    for name, owner in list(ties.items()):
        if not {name, owner} <= parts.keys():
            continue
        del ties[name]
        for part, its in zip(parts[name], parts[owner], strict=True):
            path, _, leaf = part.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(its))
            ties[part] = its


def _split(module: Any) -> SplitExperts:
    layout = layout_of(module)
    assert layout is not None
    fused = dict(module.named_parameters())
    last = fused[
        list(layout.weights.values())[-1].tensor
    ]  # LongCat's other one also counts what is no expert
    count = len(last) if last.dim() == 3 else int(module.num_experts)
    parts = {name: cut.read(fused[tensor]) for name, tensor, cut in layout.cuts(count)}
    # Without its tensors, the module still knows its gate.
    shapes = {slot.tensor: fused[slot.tensor].shape for slot in layout.slots}
    for name in shapes:
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
    gate = Gate(module, any(slot.half == "even" for slot in layout.weights.values()))

    def linear(number: int, name: str) -> nn.Linear:
        prefix = ".".join(part for part in (str(number), name) if part)
        return _linear(parts.pop(f"{prefix}.weight"), parts.pop(f"{prefix}.bias", None))

    experts: list[nn.Module] = [
        linear(number, "")
        if "" in layout.weights
        else Expert({name: linear(number, name) for name in layout.weights}, gate)
        for number in range(count)
    ]
    return SplitExperts(experts, layout, module, shapes)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear around `weight` [out, in] and `bias` [out], which are copied (a view would keep all experts in memory)."""
    out, width = weight.shape
    linear = nn.Linear(width, out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(
        weight.detach().clone(memory_format=torch.contiguous_format), weight.requires_grad
    )
    if bias is not None:
        linear.bias = nn.Parameter(
            bias.detach().clone(memory_format=torch.contiguous_format), bias.requires_grad
        )
    return linear
