"""cam: class activation maps from a layer's activations and gradients, batched."""

from __future__ import annotations

from torch import Tensor

from part_fast import backends, checks
from part_fast.errors import BadValueError

# The raw op's `method` argument is the place in this tuple.
METHODS = ("gradcam", "xgradcam", "layercam", "hirescam")


def _reference(activation: Tensor, gradient: Tensor, method: int) -> Tensor:
    dtype = checks.compute_dtype(activation)
    activation, gradient = activation.to(dtype), gradient.to(dtype)
    name = METHODS[method]
    if name == "gradcam":
        weights = gradient.mean((2, 3), keepdim=True)
    elif name == "xgradcam":
        weights = (gradient * activation).sum((2, 3), keepdim=True) / (activation + 1e-8).sum((2, 3), keepdim=True)
    elif name == "layercam":
        weights = gradient.relu()
    else:
        weights = gradient
    return (weights * activation).sum(1).relu()


_cam = backends.define(
    "_cam(Tensor activation, Tensor gradient, int method) -> Tensor",
    _reference,
    lambda activation, gradient, method: activation.new_empty(
        (activation.shape[0], *activation.shape[2:]), dtype=checks.compute_dtype(activation)
    ),
    kernels="cam",
)


def cam(activation: Tensor, gradient: Tensor, method: str = "gradcam") -> Tensor:
    """Class activation map (N,h,w), non-negative, float32 (float64 for float64), one per sample.

    activation, gradient: (N,K,h,w) of one dtype, the target layer's output and the gradient of the class score for it.
    method: how the channels k are weighted, w_k:
        gradcam    mean_hw(g_k)                             Selvaraju et al., ICCV 2017, eq. 1 and 2
        xgradcam   sum_hw(g_k A_k) / sum_hw(A_k + 1e-8)     Fu et al., BMVC 2020, eq. 8
        layercam   relu(g_k), at each place                 Jiang et al., IEEE TIP 2021, eq. 4 to 6
        hirescam   g_k, at each place                       Draelos and Carin, 2020, arXiv 2011.08891
    Not differentiable: the result does not require grad.

    Equivalent to: `(w * activation).sum(1).relu()`, computed in float32.
    Errors: TypeError or ValueError that names the argument; an unknown method lists the known ones;
    NotImplementedError for an argument with a forward-mode tangent.
    """
    if method not in METHODS:
        raise BadValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if any(checks.has_tangent(value) for value in (activation, gradient)):
        raise NotImplementedError("cam is not differentiable, and has no forward-mode derivative: detach its arguments")
    checks.features("activation", activation)
    checks.alike("gradient", checks.features("gradient", gradient), "activation", activation)
    activation = activation.detach()
    activation = checks.dense(activation)
    return _cam(activation, checks.same_format(gradient.detach(), activation), METHODS.index(method))
