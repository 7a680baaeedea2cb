"""From a blueprint and a model to a native program: every operation finds its modules, its weights and its registers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.kernels import (
    Activations,
    Elementwise,
    HeadSpans,
    InputRounding,
    NativeProgram,
    PackedLinear,
    Span,
    Tables,
)
from fracbit.kernels.cpu import NATIVE, NOTE
from fracbit.kernels.kernel import FLOAT_TYPES
from fracbit.kernels.program import in_a_row
from fracbit.models import blueprint as of
from fracbit.models.blocks import bias_of, blocks, find, is_linear, weight_of
from fracbit.models.blueprints import blueprint_of, covered_types
from fracbit.models.experts import Expert, SplitExperts, layout_of
from fracbit.models.find import family_of
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedCopy, TiedHead
from fracbit.numerics.activations import input_type
from fracbit.records.inputs import Inputs
from fracbit.transforms.rotation import turn_factors

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Those that do not depend on the length of the text."""
CURVES = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh", "FastGELUActivation": "gelu_tanh", "BloomGelu": "gelu_tanh", "ReLU": "relu",
    "ReLUSquaredActivation": "relu_squared", "QuickGELUActivation": "quick_gelu",
}  # fmt: skip
"""Activations by the class of their module."""
LAYER_TYPES = ("full_attention", "sliding_attention")
UNCENTERED = "RMSNorm"
PARAMETERLESS_EPSILON = 1e-5
"""Of OLMo's norm, which has no attribute for it."""


class Obstacle(Exception):
    """Why a model has no native step."""


@dataclass(frozen=True)
class InputReading:
    """What happens to numbers before a layer multiplies them."""

    rotated: bool = False
    inputs: Inputs | None = None


PLAINLY = InputReading()


def _rounding(inputs: Inputs) -> InputRounding:
    table = input_type(inputs)
    if not inputs.group and inputs.scope != "token" and inputs.scale is None:
        raise Obstacle("its activations have no scale yet")
    if inputs.scope == "tensor" and inputs.scale == 0:
        raise Obstacle("some of its activations have the static scale 0: every calibration token was 0 there")
    end = abs(table.far)
    return InputRounding(
        values=table.values[0], boundaries=table.boundaries[0], step=float(table.step or 0.0), end=end, group=inputs.group,
        scale=float(inputs.scale or 0.0) / end if inputs.scope == "tensor" else 0.0,
    )  # fmt: skip


def check(model: PreTrainedModel) -> None:
    """Raises `Obstacle` for a model that has no native step whatever its layers are."""
    config = model.config
    if NATIVE is None:
        raise Obstacle(NOTE)
    if model.device.type != "cpu":
        raise Obstacle(f"the model is on {model.device}, and the native step runs on CPUs")
    if model.dtype not in FLOAT_TYPES:
        raise Obstacle(f"it computes in {model.dtype}")
    if config.model_type not in covered_types():
        raise Obstacle(
            f"models of type {config.model_type} have no native step; these have: {', '.join(covered_types())}"
        )
    blueprint = blueprint_of(config)
    if blueprint is None:
        raise Obstacle(f"this variant of {config.model_type} has no native step")
    for name, allowed in blueprint.only:
        if getattr(config, name, None) not in allowed:
            raise Obstacle(f"its {name} is {getattr(config, name, None)!r}")
    for rotation in _rotations(config) if blueprint.rotary else ():
        if rotation not in FIXED_ROTATIONS:
            raise Obstacle(f"its rotation ({rotation}) is not one of {', '.join(FIXED_ROTATIONS)}")


def _rotations(config: Any) -> list[str]:
    """The types of its rotations: one, or one for each type of layer."""
    given: Mapping[str, Any] = config.rope_parameters
    each = [given] if "rope_type" in given else [one for one in given.values() if isinstance(one, Mapping)]
    return [str(one.get("rope_type")) for one in each]


class StepCompiler:
    """Turns a blueprint and a model into `program`. Raises `Obstacle`."""

    def __init__(self, model: PreTrainedModel) -> None:
        blueprint = blueprint_of(model.config)
        assert blueprint is not None
        self.model, self.config, self.blueprint = model, model.config, blueprint
        self.gain_offset = family_of(model).gain_offset
        self.watched: list[Tensor] = []
        self.packed: list[tuple[QuantLinear | QuantEmbedding, PackedLinear]] = []
        self._activations: set[Activations] = set()
        self._registers: dict[tuple[str, int], Span] = {}
        self._spans: dict[str, Span] = {}
        self._heads: dict[str, HeadSpans] = {}
        self._rotations: list[str] = []  # the layer types that have one of their own, or ""
        self._biases: list[float] = []  # factors of ALiBi
        self._layer_type = ""
        self._root: nn.Module = model
        stack = [block for _, block in blocks(model, family_of(model))]
        self._agreed(stack)
        self.program = NativeProgram(self._vocabulary(), self._chosen())
        self._run(blueprint.before)
        for index, block in enumerate(stack):
            self._root, self._layer_type = block, self._type_of(index)
            self._run(blueprint.block)
        self._root = model
        self._run(blueprint.after)

    # --- what the model says -------------------------------------------------------------------------------------------

    def _agreed(self, stack: Sequence[nn.Module]) -> None:
        for block in stack:
            for module in block.modules():
                if isinstance(module, QuantLinear):
                    self._activations.add(module.activations)
        if len(self._activations) > 1:
            raise Obstacle("its layers differ in how they take activations")

    def _chosen(self) -> Activations:
        return next(iter(self._activations), "float")

    def _vocabulary(self) -> int:
        head = self.model.get_output_embeddings()
        return self._rows(self._weight(head, "the output head"))

    def _type_of(self, index: int) -> str:
        types = getattr(self.config, "layer_types", None)
        kind = "full_attention" if types is None else str(types[index])
        if kind not in LAYER_TYPES:
            raise Obstacle(f"a layer is of type {kind}")
        return kind

    def _number(self, name: str | int) -> int:
        """A number, or that of a config attribute."""
        found = name if isinstance(name, int) else getattr(self.config, name, None)
        return int(self.config.num_attention_heads if found is None else found)

    def _factor(self, name: str) -> float:
        found = getattr(self.config, name, None) if name else None
        return 1.0 if found is None else float(found)

    def _module(self, path: str) -> nn.Module:
        found = find(self._root, path)
        if found is None:
            raise Obstacle(f"a block has no {path}")
        return found

    def _weight(self, module: nn.Module | None, path: str) -> PackedLinear | Tensor:
        """Of a linear or a table, packed or float [rows, columns]."""
        if isinstance(module, TiedHead):
            module = module.embedding
        if isinstance(module, TiedCopy):
            module = module._shared[0]
        if isinstance(module, QuantLinear | QuantEmbedding):
            self.watched += module._buffers.values()  # type: ignore[arg-type]
            self.packed.append((module, module.ready()))
            return module.ready()
        if module is not None and (is_linear(module) or isinstance(module, nn.Embedding)):
            self.watched += module.parameters()
            return weight_of(module)
        raise Obstacle(f"{path} is a {type(module).__name__}, neither packed nor a plain linear")

    @staticmethod
    def _rows(weight: PackedLinear | Tensor) -> int:
        return int((weight if isinstance(weight, Tensor) else weight.packed).shape[0])

    def _curve(self, path: str) -> Elementwise:
        return self._curve_of(self._module(path))

    def _curve_of(self, module: object) -> Elementwise:
        name = CURVES.get(type(module).__name__)
        if name is None:
            raise Obstacle(f"the activation is {type(module).__name__}, not one of {', '.join(CURVES)}")
        return Elementwise(name)  # type: ignore[arg-type]

    # --- registers -----------------------------------------------------------------------------------------------------

    def _register(self, name: str, width: int) -> Span:
        """A register of that name; those of one name and width are one in all blocks."""
        if (name, width) not in self._registers:
            self._registers[name, width] = self.program.register(width)
        self._heads.pop(name, None)
        self._spans[name] = self._registers[name, width]
        return self._spans[name]

    def _span(self, name: str) -> Span:
        return self._spans[name]

    def _heads_of(self, name: str, size: int) -> HeadSpans:
        """The heads of a register, one after another, or as they were split."""
        if name in self._heads:
            return self._heads[name]
        span = self._span(name)
        return in_a_row(span, span.width // size)

    # --- operations ----------------------------------------------------------------------------------------------------

    def _run(self, operations: Sequence[of.Operation]) -> None:
        for operation in operations:
            ADDED[type(operation)](self, operation)

    def _either(self, operation: of.Either) -> None:
        self._run(operation.other if find(self._root, operation.module) is None else operation.held)

    def _positions(self, operation: of.Positions) -> None:
        module = self._module(operation.module)
        first = int(getattr(module, "offset", 0))
        self.program.add_positions(self._weight(module, operation.module), self._span("x"), first)

    def _gate_by(self, operation: of.GateBy) -> None:
        curve = self._curve(operation.activation)
        self.program.gate(self._span(operation.gate), self._span(operation.up), curve)

    def _add_to(self, operation: of.AddTo) -> None:
        given = self._span(operation.source)
        target = self._register(operation.to, given.width) if operation.anew else self._span(operation.to)
        self.program.add(given, target, self._factor(operation.factor), 0.0 if operation.anew else 1.0)

    def _weigh_by(self, operation: of.WeighBy) -> None:
        self.program.activate(self._span(operation.source), Elementwise("sigmoid"))
        self.program.scale_by(self._span(operation.source), self._span(operation.to))

    def _embed(self, operation: of.Embed) -> None:
        module = self._module(operation.module)
        weight = self._weight(module, operation.module)
        factor = self._factor(operation.factor)
        if isinstance(module, QuantEmbedding):
            factor *= module.factor
        elif hasattr(module, "embed_scale"):
            factor *= float(module.get_buffer("embed_scale").to(module.get_parameter("weight").dtype))
        shape = weight.shape if isinstance(weight, Tensor) else weight.packed.shape
        self.program.embed(weight, self._register(operation.to, int(shape[1])), factor)

    def _normalize(self, operation: of.Normalize) -> None:
        module = find(self._root, operation.module)
        if module is None and operation.source == operation.to:
            return
        if module is None:
            raise Obstacle(f"a block has no {operation.module}")
        held: dict[str, Any] = dict(module.named_parameters(recurse=False))
        gain, bias = held.get("weight"), held.get("bias")
        self.watched += held.values()
        kind, width = type(module).__name__, self._span(operation.source).width
        if UNCENTERED not in kind and "LayerNorm" not in kind:
            raise Obstacle(f"{operation.module} is a {kind}, not a norm that is known")
        epsilon = next(
            (float(getattr(module, name)) for name in ("variance_epsilon", "eps") if hasattr(module, name)),
            PARAMETERLESS_EPSILON,
        )
        size = width if gain is None else len(gain)
        source = self._heads_of(operation.source, size)
        if operation.source == operation.to:
            target = source
        else:
            self._register(operation.to, width)
            target = self._heads_of(operation.to, size)
        if gain is not None and self.gain_offset:
            gain = gain.float() + self.gain_offset
        self.program.normalize(source, target, gain, bias, epsilon=epsilon, centered=UNCENTERED not in kind)

    def _multiply(self, operation: of.Multiply) -> None:
        modules = [self._module(path) for path in operation.modules]
        weights = [self._weight(*pair) for pair in zip(modules, operation.modules, strict=True)]
        read = [self._read_by(module) for module in modules]
        source = self._span(operation.source)
        to = [
            self._register(name, self._rows(weight))
            for name, weight in zip(operation.to, weights, strict=True)
        ]
        after = self._curve(operation.after) if operation.after else Elementwise()
        for how in dict.fromkeys(read):
            mine = [index for index, other in enumerate(read) if other == how]
            layers = [(weights[index], bias_of(modules[index])) for index in mine]
            self.program.multiply(layers, self._prepared(source, how), [to[index] for index in mine], after)

    @staticmethod
    def _read_by(module: nn.Module) -> InputReading:
        """What the recipe does to the numbers that a layer reads."""
        return InputReading(module.rotated, module.inputs) if isinstance(module, QuantLinear) else PLAINLY

    def _prepared(self, source: Span, how: InputReading) -> Span:
        """A register that holds what layers read of `source`."""
        if how == PLAINLY:
            return source
        to = self._register("prepared", source.width)
        if how.rotated:
            self.program.spread(source, to, turn_factors(source.width))
        if how.inputs is not None:
            self.program.round(to if how.rotated else source, to, _rounding(how.inputs))
        return to

    def _split(self, operation: of.Split) -> None:
        whole = self._span(operation.source)
        if operation.layout == "halves":
            half = whole.width // 2
            for number, name in enumerate(operation.to):
                self._spans[name] = Span(whole.register, number * half, half)
            return
        heads, kv = int(self.config.num_attention_heads), self._number(operation.kv_heads)
        size, group = whole.width // (heads + 2 * kv), heads // kv
        for name, count, first in zip(operation.to, (heads, kv, kv), (0, heads, heads + kv), strict=True):
            if operation.layout == "stacked":
                parts = in_a_row(Span(whole.register, first * size, count * size), count)
            else:
                per_group, begin = (group, 0) if first == 0 else (1, group + (first > heads))
                parts = HeadSpans(
                    whole.register, begin * size, count=count, size=size, per_group=per_group, step=size,
                    stride=(group + 2) * size,
                )  # fmt: skip
            self._spans[name], self._heads[name] = whole, parts

    def _attend(self, operation: of.Attend) -> None:
        module: Any = self._module(operation.module)
        heads, kv = int(self.config.num_attention_heads), self._number(operation.kv_heads)
        queries = self._heads_of("q", self._span("q").width // heads)
        keys, values = (self._heads_of(name, queries.size) for name in ("k", "v"))
        if operation.turned and getattr(module, "use_rope", True):
            rotation, count = self._rotation()
            self.program.turn(queries, rotation, count)
            self.program.turn(keys, rotation, count)
        if operation.repeated:
            keys, values = (
                replace(one, count=heads, per_group=heads // kv, step=0) for one in (keys, values)
            )
        scale = next(
            (
                float(getattr(module, name))
                for name in ("scaling", "inv_norm_factor")
                if hasattr(module, name)
            ),
            queries.size**-0.5,
        )
        bias = -1
        if operation.alibi:
            self._biases = [1.0 if operation.alibi == "plain" else scale]
            bias = 0
        self.program.attend(
            (queries, keys, values), self._register(operation.to, heads * queries.size), scale,
            cap=0.0 if not operation.cap else float(getattr(self.config, operation.cap, None) or 0.0),
            window=self._window(operation.window), bias=bias, sinks=getattr(module, "sinks", None),
        )  # fmt: skip

    def _window(self, which: str) -> int:
        slides = which == "all" or (which == "layer_types" and self._layer_type == "sliding_attention")
        return int(getattr(self.config, "sliding_window", None) or 0) if slides else 0

    def _rotation(self) -> tuple[int, int]:
        """The number of the rotation of this layer, and how many numbers of a head it turns."""
        rotary = self._rotary()
        kind = self._layer_type if "layer_type" in inspect.signature(rotary.forward).parameters else ""
        if kind not in self._rotations:
            self._rotations.append(kind)
        return self._rotations.index(kind), self._turns(kind, 2)[0].shape[1]

    def _rotary(self) -> Any:
        found = find(self.model, self.blueprint.rotary)
        assert found is not None, "a blueprint that turns heads names what turns them"
        return found

    def _turns(self, kind: str, room: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [room, turned] of the first `room` positions."""
        more = {"layer_type": kind} if kind else {}
        cosines, sines = (
            part[0].float() for part in self._rotary()(torch.empty(1), torch.arange(room)[None], **more)
        )  # [room, turned], or half as wide
        if not torch.equal(*sines.chunk(2, 1)):  # gpt-oss gives every angle once
            cosines, sines = (torch.cat([part, part], 1) for part in (cosines, sines))
        return cosines.contiguous(), sines.contiguous()

    def tables(self, room: int) -> Tables:
        """Rotations and biases of the first `room` positions."""
        biases = [self._slopes(room) * factor for factor in self._biases]
        return Tables([self._turns(kind, room) for kind in self._rotations], biases)

    def _slopes(self, room: int) -> Tensor:
        """What ALiBi adds to the scores of a position, [heads, room], as the model's own code computes it."""
        build: Callable[..., Tensor] = sys.modules[type(self.model).__module__].build_alibi_tensor
        heads = int(self.config.num_attention_heads)
        return build(torch.ones(1, room, dtype=torch.long), heads, torch.float32).view(heads, room)

    def _mixture(self, operation: of.RunExperts) -> None:
        router: Any = self._module(operation.router)
        experts: Any = self._module(operation.experts)
        source, parameters = self._span(operation.source), dict(router.named_parameters(recurse=False))
        if not {"weight"} <= set(parameters) <= {"weight", "bias"} or not hasattr(router, "top_k"):
            raise Obstacle(f"{operation.router} is a {type(router).__name__}, not a router that is known")
        self.watched += parameters.values()
        first, last, curve = self._experts_of(experts)
        top, count = int(router.top_k), len(last)
        scores = self._register("scores", count)
        self.program.multiply([(parameters["weight"], parameters.get("bias"))], source, [scores])
        self.program.route(scores, top, bool(getattr(router, "norm_topk_prob", True)))
        inner, outer = self._rows(first[0][0][0]), self._rows(last[0][0])
        gates, ups = (self._register(f"{name}s", top * inner) for name in ("expert gate", "expert up"))
        found = self._register("expert out", top * outer)
        self.program.run_experts(first, source, [gates, ups], apart=False)
        self.program.gate(gates, ups, curve)
        self.program.run_experts([last], gates, [found], apart=True)
        self.program.mix(found, self._register(operation.to, outer))

    def _experts_of(self, experts: Any) -> tuple[list[list[Any]], list[Any], Elementwise]:
        """Gate and up layers of every expert, their down layers, and what stands between."""
        fused = experts.fused if isinstance(experts, SplitExperts) else experts
        if hasattr(fused, "alpha") and hasattr(fused, "limit"):
            curve = Elementwise("clamped", float(fused.alpha), float(fused.limit))
        else:
            curve = self._curve_of(getattr(fused, "act_fn", None))
        names = ("gate_proj", "up_proj", "down_proj")
        if isinstance(experts, SplitExperts):
            if experts.layout.call != "routed" or not all(
                isinstance(one, Expert) for one in experts.children()
            ):
                _unknown(experts)
            parts = [[getattr(one, name) for one in experts.children()] for name in names]
            if any(self._read_by(module) != PLAINLY for modules in parts for module in modules):
                raise Obstacle("its recipe rotates or rounds what experts read")
            gate, up, down = (
                [(self._weight(module, name), bias_of(module)) for module in modules]
                for name, modules in zip(names, parts, strict=True)
            )
            return [gate, up], down, curve
        return *self._fused(experts, names), curve

    def _fused(self, experts: Any, names: Sequence[str]) -> tuple[list[list[Any]], list[Any]]:
        """The same of float experts that lie in tensors of all."""
        layout = layout_of(experts)
        if layout is None or layout.call != "routed" or set(layout.weights) != set(names):
            _unknown(experts)
        tensors = dict(experts.named_parameters())
        self.watched += tensors.values()
        found = {
            name: cut.read(tensors[tensor].detach()) for name, tensor, cut in layout.cuts(experts.num_experts)
        }
        if not all(part.is_contiguous() for part in found.values()):
            raise Obstacle("its float experts lie transposed")
        gate, up, down = (
            [
                (found[f"{number}.{name}.weight"], found.get(f"{number}.{name}.bias"))
                for number in range(experts.num_experts)
            ]
            for name in names
        )
        return [gate, up], down

    def _head(self, operation: of.Head) -> None:
        module = self._module(operation.module)
        layer, logits = (
            (self._weight(module, operation.module), bias_of(module)),
            Span(0, 0, self.program.vocabulary),
        )
        cap, divisor = getattr(self.config, operation.cap or "_", None), self._factor(operation.divisor)
        curve = Elementwise("cap", float(cap)) if cap else Elementwise()
        source = self._prepared(self._span(operation.source), self._read_by(module))
        self.program.multiply([layer], source, [logits], curve if divisor == 1 else Elementwise())
        if divisor != 1:
            self.program.add(logits, logits, 1 / divisor, keep=0.0)
            if cap:
                self.program.activate(logits, curve)


def _unknown(experts: nn.Module) -> NoReturn:
    raise Obstacle(f"its experts are a {type(experts).__name__}, which is no mixture that is known")


ADDED: Mapping[type, Callable[[StepCompiler, Any], None]] = {
    of.Embed: StepCompiler._embed, of.Positions: StepCompiler._positions, of.Normalize: StepCompiler._normalize,
    of.Multiply: StepCompiler._multiply, of.Split: StepCompiler._split, of.Attend: StepCompiler._attend,
    of.GateBy: StepCompiler._gate_by, of.AddTo: StepCompiler._add_to, of.WeighBy: StepCompiler._weigh_by,
    of.RunExperts: StepCompiler._mixture, of.Either: StepCompiler._either, of.Head: StepCompiler._head,
}  # fmt: skip
"""What adds an operation to the program."""
