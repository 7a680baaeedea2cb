"""What a run that quantizes a model notes: of every layer, of every shard, and in all. Torch-free; to JSON and back.

A shard's record is written after the shard (checkpoint/output.py), so that a run that was stopped knows what it has done; the
manifest of the finished checkpoint is made from these records alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fracbit.records.inputs import Inputs
from fracbit.records.scheme import Scheme


@dataclass(frozen=True)
class LayerRecord:
    """How one quantized layer is stored, and what it lost.

    - `scheme`: the one it got, where the run had a choice; `outliers` input columns in `outlier_dtype`.
    - `inputs`: how its activations are rounded at run time; `rotated`: they are multiplied by a Hadamard matrix before that.
    - `loss`: the quantizer's own objective, relative to that of a zero weight, before a correction changed the codes;
      `bits_per_weight` from the stored bytes.
    """

    scheme: Scheme
    loss: float
    bits_per_weight: float
    notes: tuple[str, ...] = ()
    outliers: int = 0
    outlier_dtype: str = "bf16"
    inputs: Inputs | None = None
    rotated: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; what has its default value is left out."""
        facts: dict[str, Any] = {
            "loss": self.loss,
            "bits_per_weight": self.bits_per_weight,
            "notes": list(self.notes),
            "scheme": self.scheme.to_json(),
        }
        if self.outliers:
            facts |= {"outliers": self.outliers, "outlier_dtype": self.outlier_dtype}
        if self.inputs is not None:
            facts["inputs"] = self.inputs.to_json()
        return facts | ({"rotated": True} if self.rotated else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LayerRecord:
        """Read what `to_json` wrote."""
        fields = dict(data) | {"scheme": Scheme.from_json(data["scheme"]), "notes": tuple(data["notes"])}
        if "inputs" in fields:
            fields["inputs"] = Inputs.from_json(fields["inputs"])
        return LayerRecord(**fields)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file: type and shape as its header names them, and the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> StoredTensor:
        """Read what `to_json` wrote."""
        return StoredTensor(
            str(data["dtype"]), tuple(int(size) for size in data["shape"]), str(data["sha256"])
        )


@dataclass(frozen=True)
class TweakRecord:
    """What a correction did to block number `block`: relative squared error of its output on held-out samples.

    `kept`: the variant that stayed, `none` where none helped.
    """

    block: int
    before: float
    after: float
    kept: str


@dataclass(frozen=True)
class RefineRecord:
    """What refining did to a layer: its loss, relative to that of a zero weight, as the file had it and as it is now."""

    before: float
    after: float


@dataclass(frozen=True)
class DistillRecord:
    """What self-distillation did: nats per token from the float model on held-out samples before and after, epochs done."""

    before: float
    after: float
    epochs: int


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard.

    `hashes`: SHA-256 of every tensor that was read for it, by its name in the source; `layers`: its quantized layers;
    `stored`: the tensors in its file; `refined`: layers of a foreign checkpoint that were moved; `notes`: what to know
    of such layers.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    tweak: TweakRecord | None = None
    distilled: DistillRecord | None = None
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    refined: Mapping[str, RefineRecord] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        data: dict[str, Any] = {
            "hashes": dict(self.hashes),
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "stored": {name: tensor.to_json() for name, tensor in self.stored.items()},
        }
        data |= {} if self.tweak is None else {"tweak": asdict(self.tweak)}
        data |= {"refined": {n: asdict(one) for n, one in self.refined.items()}} if self.refined else {}
        data |= {"notes": dict(self.notes)} if self.notes else {}
        return data | ({} if self.distilled is None else {"distilled": asdict(self.distilled)})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ShardRecord:
        """Read what `to_json` wrote."""
        layers = {name: LayerRecord.from_json(layer) for name, layer in data["layers"].items()}
        tweak = TweakRecord(**data["tweak"]) if "tweak" in data else None
        distilled = DistillRecord(**data["distilled"]) if "distilled" in data else None
        stored = {name: StoredTensor.from_json(tensor) for name, tensor in data["stored"].items()}
        refined = {name: RefineRecord(**one) for name, one in data.get("refined", {}).items()}
        return ShardRecord(
            data["hashes"], layers, tweak=tweak, distilled=distilled, stored=stored, refined=refined,
            notes=data.get("notes", {}),
        )  # fmt: skip


BROKEN = 1.0  # nats per token above the float model's loss: less than a third of the probability of every right token
LARGEST = 4  # names of what stays float that a sentence has
OVERRIDE = "override"  # how the reason of a layer begins that a recipe names
ALLOWED = 0.1  # share of the blocks' matrices that may stay float without a warning


@dataclass(frozen=True)
class Totals:
    """What a checkpoint costs. Bits are counted from the stored bytes.

    `bits_per_weight` over the quantized layers (None: there are none), `bits_per_parameter` over everything; `bytes` of all
    weight files; `source_bytes` of the tensors of the float model.
    """

    bits_per_weight: float | None
    bits_per_parameter: float
    bytes: int
    source_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Share:
    """Shares, 0..1, of the weights that become smaller: of the matrices in the blocks, and of all parameters.

    `kept_float`: what stays float in the blocks, largest first: names with `*` for numbers, the share of the blocks' matrices
    that it is, and why.
    """

    blocks: float
    parameters: float
    kept_float: tuple[tuple[str, float, str], ...]

    def __str__(self) -> str:
        """One sentence, with the largest of what stays float."""
        text = f"{self.blocks:.1%} of the weights in the blocks' matrices and {self.parameters:.1%} of all parameters "
        kept = f"; float in the blocks: {self._largest()}" if self.kept_float else ""
        return f"{text}become smaller{kept}"

    def _largest(self) -> str:
        named = [f"{name} ({share:.1%}, {why})" for name, share, why in self.kept_float[:LARGEST]]
        more = len(self.kept_float) - LARGEST
        return ", ".join(named) + (f" and {more} more" if more > 0 else "")

    def warning(self, allowed: float) -> tuple[str, ...]:
        """A warning where more than `allowed` of the blocks' matrices stays float, without those that the user named."""
        named = sum(share for _, share, why in self.kept_float if why.startswith(OVERRIDE))
        if 1 - self.blocks - named <= allowed:
            return ()
        return (
            f"only {self.blocks:.1%} of the blocks' matrices become smaller; float: {self._largest()}. If that is meant: "
            f"--allow-float {1 - self.blocks + 0.005:.2f}",
        )


@dataclass(frozen=True)
class Bought:
    """A checkpoint beside its float model on `tokens` ids of a held-out `text`.

    - `nll`, `float_nll`: losses in nats per token; `kl`: mean KL(float || quantized) in nats per token.
    - `agreement`: share of ids, 0..1, with the same most likely next one.
    """

    text: str
    tokens: int
    float_nll: float
    nll: float
    kl: float
    agreement: float

    @property
    def broken(self) -> bool:
        """Whether the loss says that the model was broken: it is not finite, or a nat above the float model's."""
        return not self.nll - self.float_nll < BROKEN

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"on {self.tokens} tokens of {self.text}: perplexity {_perplexity(self.nll)}, float "
            f"{_perplexity(self.float_nll)}; KL {self.kl:.4f} nats per token, same top token {self.agreement:.1%}"
        )

    def warning(self) -> tuple[str, ...]:
        """A warning where quantization broke the model."""
        if not self.broken:
            return ()
        return (
            f"this model is broken: its perplexity is {_perplexity(self.nll)}, and the float model's "
            f"{_perplexity(self.float_nll)}; take more bits, smaller blocks or --preset good with --calibration builtin",
        )


def _perplexity(nll: float) -> str:
    return f"{math.exp(nll):.4g}" if nll < 700 else "beyond all numbers"


@dataclass(frozen=True)
class Result(Totals):
    """What a run made: the folder `output`, what it costs, and what the user should know (`notes`).

    `seconds` of this process (a resumed run counts its last part), `peak_rss_bytes` the most memory it had resident, `share`
    how much of the model became smaller. `bought`: its predictions beside the float model's, where it was asked for.
    """

    output: str
    seconds: float
    peak_rss_bytes: int
    share: Share
    notes: tuple[str, ...] = ()
    bought: Bought | None = None


@dataclass(frozen=True)
class Improved:
    """What `tweak` or `refine` made of a foreign checkpoint: the folder `output`, and the bytes of its weight files.

    - `tweaks`: blocks whose norms were moved against a float model; `layers`: those whose codes and scales were moved.
    - `loss`: of the whole model in nats per token on held-out samples, where its norms were trained at once.
    """

    output: str
    method: str
    bytes: int
    seconds: float
    peak_rss_bytes: int
    tweaks: tuple[TweakRecord, ...] = ()
    layers: Mapping[str, RefineRecord] = field(default_factory=dict)
    loss: DistillRecord | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One sentence: what was moved, and what that did to the error that it was judged by."""
        if self.loss is not None:
            if not self.loss.epochs:
                return f"norms by {self.method}: no epoch lowered the loss of {self.loss.before:.4f} nats on held-out samples"
            fell = f"from {self.loss.before:.4f} to {self.loss.after:.4f} nats on held-out samples"
            return f"norms by {self.method}: the loss fell {fell}"
        if self.layers:
            kept = sum(layer.after < layer.before for layer in self.layers.values())
            mean = _geometric_mean(
                [layer.after / layer.before for layer in self.layers.values() if layer.before > 0]
            )
            return f"{kept} of {len(self.layers)} layers moved; their loss is {mean:.3f} of what it was (geometric mean)"
        moved = sum(tweak.kept != "none" for tweak in self.tweaks)
        mean = _geometric_mean([tweak.after / tweak.before for tweak in self.tweaks if tweak.before > 0])
        return (
            f"norms of {moved} of {len(self.tweaks)} blocks moved by {self.method}; the error of their outputs on held-out "
            f"samples is {mean:.3f} of what it was (geometric mean)"
        )


def _geometric_mean(ratios: Sequence[float]) -> float:
    """1 where there are none."""
    return math.exp(sum(math.log(max(ratio, 1e-30)) for ratio in ratios) / len(ratios)) if ratios else 1.0
