"""Training of a block: what it lowers, how far it goes, what it moves, and which state it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import torch

from evidence import quantized_block
from fracbit.models import train as training
from fracbit.models.correction import Corrected, Evidence, run_batch
from fracbit.models.find import family_of
from fracbit.models.train import LAST, MEAN, Train, rate_at, weigh
from fracbit.numerics import decode, parts_of
from fracbit.records.scheme import Scheme

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Maker = Callable[..., "LlamaForCausalLM"]
Students = list[Any]


def trained(maker: Maker, how: Train, scheme: Scheme, **changed: Any) -> tuple[Corrected, Evidence]:
    model = maker()
    block, evidence = quantized_block(model, scheme)
    evidence = replace(evidence, **changed)
    return how(block, family_of(model), evidence, lambda what, done, total: None), evidence


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> Students:
    """Every student that is made."""
    made: Students = []
    real = training._Student
    monkeypatch.setattr(training, "_Student", lambda *parts: made.append(real(*parts)) or made[-1])
    return made


@pytest.fixture
def ever_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every epoch counts as better than those before it: the last state is kept."""
    coming = count()
    monkeypatch.setattr(training, "error", lambda *_: -float(next(coming)))


SCHEMES = [Scheme("int", 2, 24), Scheme("int", 4, 24, offset="zero"), Scheme("kmeans", 3, 24)]


def test_the_weight_of_a_token_falls_with_the_size_of_its_states() -> None:
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(weigh(4 * states), weigh(states) / 4)
    assert weigh(states).shape == (2, 5, 1)


def test_the_loss_weighs_every_token(tiny_llama: Maker, students: Students) -> None:
    _, evidence = trained(tiny_llama, Train(epochs=1), Scheme("int", 2, 24))
    huge = evidence.exits.clone()
    huge[:, 0] *= 1000
    evidence = replace(evidence, exits=huge)
    student, number = students[0], evidence.train[0]
    batch = evidence.entrance.batches[number]
    wanted = huge[batch.start : batch.stop]  # [samples, tokens, width]
    found = run_batch(student.block, evidence, number, student.values())
    sizes = wanted.square().mean(-1).sqrt()  # [samples, tokens]
    expected = ((found - wanted).square().mean(-1) / sizes).mean()
    assert training._loss(student, evidence, number).item() == pytest.approx(expected.item(), rel=1e-5)


def test_rates_rise_and_fall_to_the_mean_that_is_counted_on() -> None:
    shares = [step / 10000 for step in range(10000)]
    assert sum(map(rate_at, shares)) / len(shares) == pytest.approx(MEAN, rel=0.01)
    assert max(map(rate_at, shares)) == pytest.approx(1, rel=1e-3)
    assert rate_at(0) == rate_at(1) == pytest.approx(LAST)


@pytest.mark.parametrize(
    "scheme", [Scheme("int", 2, 24), Scheme("int", 4, 24, offset="zero"), Scheme("kmeans", 3, 24)], ids=str
)
@pytest.mark.parametrize("reach", [0.05, 0.4])
def test_latent_weights_go_as_far_as_they_may(
    tiny_llama: Maker, monkeypatch: pytest.MonkeyPatch, scheme: Scheme, reach: float
) -> None:
    """The furthest of them nearly as far as `reach`, in steps of their grid, and none much further."""
    moves: list[float] = []

    class Watched(training.SoftLinear):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            self.first = self.latent.detach().clone()

        def packed(self) -> Any:
            values = self.base.table.values
            step = float((values[:, -1] - values[:, 0]).mean()) / (values.shape[1] - 1)
            moves.append(float((self.latent.detach() - self.first).abs().max()) / step)
            return super().packed()

    monkeypatch.setattr(training, "SoftLinear", Watched)
    trained(tiny_llama, Train(epochs=6, reach=reach), scheme)
    assert 0.5 * reach < max(moves) < 1.3 * reach


@pytest.mark.parametrize("scheme", [Scheme("nf", 2, 24, offset="float"), Scheme("kmeans", 2, 24)], ids=str)
def test_everything_that_is_stored_moves(tiny_llama: Maker, ever_better: None, scheme: Scheme) -> None:
    found, evidence = trained(tiny_llama, Train(epochs=4, reach=4), scheme)
    assert found.kept == "epoch 4"
    moved = {
        part
        for name, packed in found.packed.items()
        for (part, new), (_, old) in zip(parts_of(packed), parts_of(evidence.packed[name]), strict=True)
        if not torch.equal(new, old)
    }
    assert moved == {part for packed in evidence.packed.values() for part, _ in parts_of(packed)}


@pytest.mark.parametrize(
    ("errors", "kept"), [((1.0, 0.5, 0.7, 0.6), 1), ((1.0, 0.9, 0.5, 0.6), 2), ((1.0, 1.1, 1.2, 1.3), 0)]
)
def test_the_best_state_is_kept(
    tiny_llama: Maker, monkeypatch: pytest.MonkeyPatch, errors: tuple[float, ...], kept: int
) -> None:
    seen: list[Mapping[str, torch.Tensor]] = []
    coming: Iterator[float] = iter(errors)

    def scripted(block: object, evidence: object, values: Mapping[str, torch.Tensor], _: object) -> float:
        seen.append(values)
        return next(coming)

    monkeypatch.setattr(training, "error", scripted)
    found, _ = trained(tiny_llama, Train(epochs=3, reach=2), Scheme("int", 2, 24))
    assert (found.before, found.after) == (1.0, errors[kept])
    assert found.kept == (f"epoch {kept}" if kept else "none")
    assert bool(found.packed) == bool(kept)
    for name, packed in found.packed.items():
        assert torch.equal(decode(packed), seen[kept][f"{name}.weight"])
        assert not any(
            torch.equal(decode(packed), other[f"{name}.weight"]) for n, other in enumerate(seen) if n != kept
        )


def test_the_seed_shuffles_the_batches(tiny_llama: Maker, ever_better: None) -> None:
    """Some of several seeds take another order of the three batches, and each repeats itself."""

    def codes(seed: int) -> tuple[bytes, ...]:
        found, _ = trained(tiny_llama, Train(epochs=1, reach=2), Scheme("kmeans", 2, 24), seed=seed)
        return tuple(decode(packed).numpy().tobytes() for packed in found.packed.values())

    assert len({codes(seed) for seed in range(4)}) > 1
    assert codes(1) == codes(1)


def test_norms_are_judged_in_the_type_in_which_they_are_stored(
    tiny_llama: Maker, students: Students, ever_better: None
) -> None:
    trained(tiny_llama, Train(epochs=2, reach=2), Scheme("int", 2, 24), kind=torch.bfloat16)
    for norm in students[0].norms.values():
        assert not torch.equal(norm.value(), norm.start), "it moved"
        assert torch.equal(norm.value(), norm.value().bfloat16().float())
