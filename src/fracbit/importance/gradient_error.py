"""What the loss itself says about a scheme's error: its gradient times the error, first order and second.

`gradient`: sum over weights of |g (q - w)|, g the gradient of the mean loss, as AutoRound's AutoScheme (delta_loss.py).
`fisher`: half the mean over samples of <g_s, q - w>^2 times the tokens of a sample: the loss's second-order term with the
empirical Fisher matrix of the whole unit in place of the Hessian. The mean gradient of a trained model is near zero and what
is left of it is noise, but a sum of absolute values does not cancel; both are offered.

Both weight the error that quantization really makes, not the weights as they are: "importance is not fragility".
"""

from fracbit.importance.methods import ScoreMethod
from fracbit.importance.view import LayerView, error_of
from fracbit.records.scheme import Scheme


def gradient_error(view: LayerView, scheme: Scheme | None) -> float:
    """Sum over the unit's weights of |gradient x error|, in nats per token."""
    errors = {name: error_of(weight, scheme) for name, weight in view.weights.items()}  # [out, in] each
    return sum(float((view.gradients[name] * error).abs().double().sum()) for name, error in errors.items())


def fisher_error(view: LayerView, scheme: Scheme | None) -> float:
    """Half the tokens of a sample times the mean squared derivative along the error, in nats per token."""
    slopes = view.slopes[scheme].double()  # [samples]
    return 0.5 * view.sample_tokens * float(slopes.square().mean())


GRADIENT = ScoreMethod("sum of |gradient x error|", None, gradient_error, frozenset({"weights", "gradients"}))
FISHER = ScoreMethod("second-order loss along the error", None, fisher_error, frozenset({"slopes"}))
