"""CamBudget: from images to each pixel's eps, by what the model itself looks at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from part_fast import checks
from part_fast.controls import check_control, control_map
from part_fast.eval_mode import eval_mode, uncached_autocast
from part_fast.external_cam import Explain, external_cam
from part_fast.ops.cam import METHODS, cam
from part_fast.ops.cam_mask import parse_rule
from part_fast.ops.epsilon_map import epsilon_map, packed_epsilon_map
from part_fast.ops.packed_epsilon import PackedEpsilon, eps_pair

# Where ResNets and WideResNets have their last feature map.
DEFAULT_LAYERS = ("layer4", "block3")


class CamBudget:
    """Per-pixel eps from class activation maps of `model`: `budget(x) -> (N,M,H,W)`, float32.

    eps, eps_low: image units, 0 <= eps_low <= eps: for the pixels that matter, and for the rest.
    method: "gradcam", "xgradcam", "layercam" or "hirescam", see `part_fast.cam`; or, at whatever they cost, a class
        of the `grad-cam` package, or callable(model, x, target) -> (N,h,w), run in eval mode.
    rule: "zscore", "released", "quantile:q" or "soft", see `part_fast.epsilon_map`.
    target_layer: the module, or its name in `model.named_modules()`, whose output (N,K,h,w) is explained;
        default: the module called `layer4`, else `block3`, under any prefix.
    control: "none", "permuted", "random", "inverted" or "uniform": what is done to the map afterwards, to tell
        whether the CAM matters; see `part_fast.controls`. "permuted" and "random" draw from torch's generators.

    A call is batched: one eval-mode forward, and a backward from the logits to the target layer only (nothing
    before it records a graph). It leaves no trace: training mode, hooks, .grad, BatchNorm statistics and the
    random generators are as before, also after an exception.

    Equivalent to: `epsilon_map(cam(A, dA, method), x.shape[2:], eps, eps_low, rule)`, where A is the target
    layer's output and dA the gradient of each image's target logit for it.
    Source: Zhang et al., "Improving Accuracy-robustness Trade-off via Pixel Reweighted Adversarial Training",
    ICML 2024, arXiv 2406.00685, algorithm 1.
    Errors: TypeError or ValueError that names the argument; without a target layer, it lists candidates.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        eps_low: float = 7 / 255,
        *,
        method: str | type | Explain = "gradcam",
        rule: str = "zscore",
        target_layer: nn.Module | str | None = None,
        control: str = "none",
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if method not in METHODS and (isinstance(method, str) or not callable(method)):
            known = f"{', '.join(METHODS)}, a class of grad-cam or a callable"
            raise ValueError(f"method must be one of {known}, got {method!r}")
        self.eps, self.eps_low = eps_pair(eps, eps_low)
        self.channels = parse_rule(rule, 1, 1, soft=True)[2]
        self.model = model
        self.method = method
        self.rule = rule
        self.control = check_control(control)
        self.target_layer = _find_layer(model, target_layer)

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Eps map (N,M,H,W) of the images x (N,C,H,W) in [0,1].

        target: class indices (N,) to explain; default: the model's prediction.
        """
        return self.with_logits(x, target)[0]

    def with_logits(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The eps map, and the eval-mode logits (N,classes) of the forward that it came from, detached.

        For losses that need the clean logits anyway, such as TRADES.
        """
        with record_function("part_fast: CAM"):
            evidence, logits = self.evidence(x, target)
            eps = epsilon_map(evidence, (x.shape[2], x.shape[3]), self.eps, self.eps_low, self.rule).float()
            return control_map(eps, self.control, self.eps, self.eps_low), logits

    def packed(self, x: Tensor, target: Tensor | None = None) -> PackedEpsilon:
        """The eps map as one bit per value, before any control; every rule but "soft"."""
        with record_function("part_fast: CAM"):
            evidence, _ = self.evidence(x, target)
            return packed_epsilon_map(evidence, (x.shape[2], x.shape[3]), self.eps, self.eps_low, self.rule)

    def evidence(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The class activation maps (N,h,w), and the logits (N,classes) that they explain, detached."""
        checks.values("x", checks.images("x", x), 0, 1)
        if target is not None:
            checks.labels("target", target, x)
        if x.shape[0] == 0:  # layers disagree on empty batches
            return x.new_empty(0, 1, 1, dtype=torch.float32), x.new_empty(0, 0)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.inference_mode(False), torch.random.fork_rng(devices), eval_mode(self.model):
            x = x.clone() if x.is_inference() else x.detach()
            activation, logits = self._forward(x)
            if target is None:
                target = logits.detach().argmax(1)
            else:
                checks.labels("target", target, x, logits.shape[1])
            if callable(self.method):
                return external_cam(self.method, self.model, self.target_layer, x, target.clone()), logits.detach()
            with torch.enable_grad():
                score = logits.gather(1, target[:, None].clone()).sum()
            (gradient,) = torch.autograd.grad(score, activation, allow_unused=True)
        if gradient is None:
            raise ValueError("target_layer must lead to the logits, got a layer whose output they do not depend on")
        # Pooling gives gradients that share elements (expanded), which ops refuse.
        gradient = checks.same_format(gradient.to(activation.dtype), activation)
        return cam(activation, gradient, self.method), logits.detach()

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Target layer's output, a leaf of the graph that leads from it to the logits, and the logits."""
        found: list[Tensor] = []

        def cut(module: nn.Module, args: object, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor) or output.ndim != 4:
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"target_layer must give a tensor (N,K,h,w), got {got}")
            torch.set_grad_enabled(True)  # until the no_grad block below ends
            activation = output.detach()
            if not (activation.is_contiguous() or activation.is_contiguous(memory_format=torch.channels_last)):
                activation = activation.contiguous()
            found.append(activation.requires_grad_())
            return activation.clone()  # a leaf must not be overwritten, and an in-place ReLU may come next

        handle = self.target_layer.register_forward_hook(cut)
        try:
            with torch.no_grad(), uncached_autocast():
                logits = self.model(x)
        finally:
            handle.remove()
        if not found:
            raise ValueError("target_layer must be run by the model's forward, got a layer that was not")
        if logits.ndim != 2:
            raise ValueError(f"model must give logits (N,classes), got {tuple(logits.shape)}")
        return found[-1], logits


def _find_layer(model: nn.Module, target_layer: nn.Module | str | None) -> nn.Module:
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(target_layer, nn.Module):
        if not any(module is target_layer for module in model.modules()):
            raise ValueError(f"target_layer must be a module of the model, got another {type(target_layer).__name__}")
        return target_layer
    if isinstance(target_layer, str):
        if target_layer not in modules:
            raise ValueError(f"target_layer must be one of {_candidates(modules)}, got {target_layer!r}")
        return modules[target_layer]
    if target_layer is not None:
        raise TypeError(f"target_layer must be a module or its name, got {type(target_layer).__name__}")
    for layer in DEFAULT_LAYERS:
        matches = [module for name, module in modules.items() if name.rpartition(".")[2] == layer]
        if len(matches) == 1:
            return matches[0]
    none = f"the model has no {' or '.join(DEFAULT_LAYERS)}"
    raise ValueError(f"target_layer must be given, {none}; candidates: {_candidates(modules)}")


def _candidates(modules: dict[str, nn.Module]) -> str:
    """Names of the parts that hold convolutions, the deepest stages last, at most a line of them."""
    convolutional = [
        name
        for name, module in modules.items()
        if name.count(".") <= 1 and any(isinstance(part, nn.Conv2d) for part in module.modules())
    ]
    return ", ".join(convolutional[-12:]) or "none with a convolution"
