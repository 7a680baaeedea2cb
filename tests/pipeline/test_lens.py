"""The lens over a model: intensities as asked, hooks removed, intervals and sums right, fresh noise in every forward."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from fracbit.errors import FracbitError, RecipeError
from fracbit.perturbation import PERTURBATIONS
from fracbit.pipeline.study.float_model import FloatModel, float_model_of, measure
from fracbit.pipeline.study.lens import (
    fixed_points,
    intensity_curves,
    interval,
    per_module,
    perturbed,
    probe,
    unit_effects,
)
from fracbit.pipeline.study.lens_errors import (
    clip,
    named_error,
    noise,
    noise_like,
    noise_like_clipping,
    rounding,
)
from fracbit.pipeline.study.planted import plant_outliers
from fracbit.records.lens import LensPoint, additivity, fragility, sensitivity_scores
from fracbit.records.scheme import Scheme


@pytest.fixture
def float_model(tiny_llama: Callable[..., LlamaForCausalLM]) -> FloatModel:
    return float_model_of(tiny_llama(initializer_range=0.3))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", ["weights", "activations", "both"])
@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_the_intensity_over_the_model_is_the_one_asked_for(
    float_model: FloatModel, ids: torch.Tensor, kind: str, target: str
) -> None:
    before = {name: tensor.clone() for name, tensor in float_model.model.state_dict().items()}
    point = probe(float_model, ids, noise(kind, 0.1), kind, target, seeds=(0, 1))  # type: ignore[arg-type]
    assert point.intensity == pytest.approx(0.1, rel=1e-3)
    assert point.low <= point.change <= point.high
    assert len(point.changes) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in float_model.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in float_model.model.modules())


def test_hooks_and_weights_are_as_before_when_something_raises(
    float_model: FloatModel, ids: torch.Tensor
) -> None:
    def broken(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        raise KeyboardInterrupt

    base = measure(float_model, ids).nll
    for target in ("weights", "activations", "both"):
        with pytest.raises(KeyboardInterrupt):
            probe(float_model, ids, broken, "broken", target)  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in float_model.model.modules())
    assert measure(float_model, ids).nll == base


def test_activation_noise_is_fresh_and_seeded(float_model: FloatModel, ids: torch.Tensor) -> None:
    layers = list(float_model.weights.layers)
    with perturbed(float_model, noise("gaussian", 0.2), "activations", layers, seed=1):
        one, two = measure(float_model, ids).nll, measure(float_model, ids).nll
    with perturbed(float_model, noise("gaussian", 0.2), "activations", layers, seed=1):
        again = measure(float_model, ids).nll
    assert one != two
    assert one == again


def test_noise_has_the_strength_of_a_scheme(float_model: FloatModel, ids: torch.Tensor) -> None:
    for target, scheme in (("weights", Scheme("nf", 3, 32)), ("activations", Scheme(bits=4, block="row"))):
        real = probe(float_model, ids, rounding(scheme), "rounding", target, seeds=(0,))  # type: ignore[arg-type]
        like = probe(float_model, ids, noise_like("rademacher", scheme), "like", target, seeds=(0,))  # type: ignore[arg-type]
        assert real.intensity > 0.01
        # The noise changes what later layers see, so activations agree less closely than weights.
        assert like.intensity == pytest.approx(real.intensity, rel=1e-3 if target == "weights" else 0.2)


def test_clipping_and_its_control_have_one_strength(float_model: FloatModel, ids: torch.Tensor) -> None:
    real = probe(float_model, ids, clip(0.01), "clip", "weights", seeds=(0,))
    like = probe(float_model, ids, noise_like_clipping(0.01), "control", "weights", seeds=(0, 1))
    assert like.intensity == pytest.approx(real.intensity, rel=1e-3)


def test_a_word_names_an_error_and_its_control(float_model: FloatModel, ids: torch.Tensor) -> None:
    """`int3/32` is what the scheme does, `clip:0.01` clips; each stands beside Gaussian noise of its strength."""
    points = fixed_points(float_model, ids, ["int3/32", "clip:0.01"], seeds=(0, 1))
    assert [p.kind for p in points] == [
        "int3/32",
        "int3/32 as gaussian",
        "clip:0.01",
        "clip:0.01 as gaussian",
    ]
    for real, control in (points[:2], points[2:]):
        assert control.intensity == pytest.approx(real.intensity, rel=1e-3)
        assert (len(real.changes), len(control.changes)) == (1, 2)
    direct = probe(float_model, ids, rounding(Scheme(bits=3, block=32)), "direct", seeds=(0,))
    assert points[0].change == direct.change
    drawn = probe(float_model, ids, named_error("gaussian", 0.1), "gaussian", seeds=(0,))
    assert drawn.change == probe(float_model, ids, noise("gaussian", 0.1), "gaussian", seeds=(0,)).change


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("gausian", "did you mean 'gaussian'"),
        ("clip:2", "must lie between 0 and 1"),
        ("clip:x", "must lie between 0 and 1"),
        ("int9/64", "or a scheme such as"),
        ("float", "makes no error"),
        ("nff4/64", "unknown data type"),
    ],
)
def test_other_words_name_no_error(word: str, says: str) -> None:
    with pytest.raises(FracbitError, match=says):
        named_error(word, 0.1)


def test_curves_rise(float_model: FloatModel, ids: torch.Tensor) -> None:
    points = intensity_curves(float_model, ids, ["gaussian", "uniform"], [0.01, 0.3], seeds=(0, 1, 2))
    assert [(p.kind, round(p.intensity, 2)) for p in points] == [
        ("gaussian", 0.01), ("gaussian", 0.3), ("uniform", 0.01), ("uniform", 0.3)
    ]  # fmt: skip
    assert abs(points[1].change) > abs(points[0].change)


@pytest.mark.parametrize("intensity", [0.0, math.nan])
def test_bad_arguments_are_refused_before_any_work(
    float_model: FloatModel, ids: torch.Tensor, intensity: float
) -> None:
    with pytest.raises(RecipeError, match="finite number above 0"):
        intensity_curves(float_model, ids, ["gaussian"], [0.1, intensity])
    with pytest.raises(RecipeError, match="unknown perturbation"):
        noise("gausian", 0.1)
    with pytest.raises(RecipeError, match="at least one seed"):
        probe(float_model, ids, noise("gaussian", 0.1), "gaussian", seeds=())


def test_units_alone_and_together(float_model: FloatModel, ids: torch.Tensor) -> None:
    units = {unit.name: list(unit.shapes) for unit in float_model.weights.units()}
    points = unit_effects(float_model, ids, units, {"int4": rounding(Scheme(bits=4))}, seeds=(0,))
    assert [point.layers for point in points] == [*units, "all"]
    (check,) = additivity(points)
    assert check.parts == pytest.approx(sum(point.change for point in points[:-1]))
    assert check.whole == points[-1].change
    scores = sensitivity_scores(points, "int4", float_model.weights.fingerprint, {})
    assert list(scores.values) == list(units)
    assert scores.kind == "sensitivity"
    assert [line["unit"] for line in fragility(points)] == sorted(
        units, key=lambda u: -fragility_of(points, u)
    )


def fragility_of(points: list[LensPoint], unit: str) -> float:
    (point,) = (point for point in points if point.layers == unit)
    return point.change / point.intensity**2


def test_modules_gather_over_blocks(float_model: FloatModel) -> None:
    modules = per_module(float_model)
    assert list(modules) == [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    assert all(len(layers) == 3 for layers in modules.values())


def test_planted_outliers_change_activations_and_not_the_model(
    float_model: FloatModel, ids: torch.Tensor
) -> None:
    with torch.no_grad():
        before = float_model.model(ids).logits
    token8 = Scheme("int", 8, "tensor")
    clean = probe(float_model, ids, rounding(token8), "int8", "activations", seeds=(0,)).intensity
    assert plant_outliers(float_model, 50.0) == 6
    with torch.no_grad():
        torch.testing.assert_close(float_model.model(ids).logits, before, rtol=1e-4, atol=1e-4)
    planted = probe(float_model, ids, rounding(token8), "int8", "activations", seeds=(0,)).intensity
    assert planted > 1.3 * clean


def test_intervals_are_students() -> None:
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == (pytest.approx(3 - 1.9634, abs=1e-3), pytest.approx(3 + 1.9634, abs=1e-3))
    assert interval([2.0]) == (2.0, 2.0)
