"""CamBudget: each pixel's eps, from class activation maps of the model that is attacked."""

from __future__ import annotations

import functools
import threading
import weakref

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from part_fast import checks
from part_fast.attack_model import AttackModel
from part_fast.attack_model.graph import capturing, surroundings
from part_fast.budgets.controls import check_control, control_map
from part_fast.budgets.external import Explain, check_method, external_cam
from part_fast.budgets.rules import Rule, ensemble, find_rule, rule_weights
from part_fast.budgets.tokens import ATTENTION_METHODS, Reshape, attention_maps, cuts_patches, reshaped, token_maps
from part_fast.checks import Clip
from part_fast.errors import BadTypeError, BadValueError
from part_fast.eval_mode import eval_mode, input_gradient, uncached_autocast, unwrapped
from part_fast.ops.cam import METHODS, cam
from part_fast.ops.cam_mask import parse_rule
from part_fast.ops.epsilon_map import epsilon_map, packed_epsilon_map
from part_fast.ops.packed_epsilon import PackedEpsilon, eps_pair
from part_fast.random_state import draws_put_back, generators_put_back

# Names of the layer that gives the last feature map in ResNets and WideResNets.
DEFAULT_LAYERS = ("layer4", "block3")

# What a training run takes for `method`, with a line of help where the name does not say it; A and B are two of them.
CAM_CHOICES = {
    **dict.fromkeys(METHODS, ""),
    "ensemble": "the mean of these, each from 0 to 1",
    "ensemble:A+B": "the mean of some",
}

# A call changes its model's mode and hooks, so one model serves one call at a time, whatever budgets it has.
_turns: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class CamBudget:
    """Per-pixel eps from class activation maps of `model`: `budget(x) -> (N,M,H,W)`, float32.

    model: images (N,C,H,W) in [0,1] -> logits (N,classes). An AttackModel takes the names and modules of the model that
        it copies. In place of DataParallel, DistributedDataParallel and compiled models, the module they wrap runs.
    eps, eps_low: image units, 0 <= eps_low <= eps: for the pixels that matter, and for the rest.
    method: "gradcam", "xgradcam", "layercam" or "hirescam", see `part_fast.cam`; "ensemble", the mean of all four, each
        stretched to [0,1], or of some, "ensemble:gradcam+layercam"; of transformers, without a layer, "rollout" or
        "attention-gradient", see `budgets.tokens.attention_maps`; or, at whatever they cost, a class or an
        object of the packages grad-cam and torchcam, or callable(model, x, target) -> (N,h,w), run in eval mode. An
        object and a callable need no layer.
    rule: "zscore", "released" (for images of three channels), "quantile:q" or "soft", see `part_fast.epsilon_map`;
        "budget-matched:MEAN" or "region:NAME", see `budgets.rules`; or a function (cam (N,h,w), size (H,W)) -> weights
        (N,1,H,W) or (N,C,H,W) in [0,1], which also gets target=(N,), the explained classes, if it has such a parameter:
        a pixel's eps is eps_low + weight * (eps - eps_low), differentiable in the weights.
    target_layer: the module, or its name in `model.named_modules()`, whose output (N,K,h,w) is explained;
        default: the module called `layer4`, else `block3`, under any prefix. docs/target_layers.md lists those of
        other networks. An output (N,h,w,K), such as Swin's, is known by its shape and the model's LayerNorms; of tokens
        (N,L,K), such as ViT's, those of patches are found, see `budgets.tokens.layout`.
    reshape: callable(the target layer's output) -> maps (N,K,h,w), for outputs and layouts of other kinds, applied to
        the output and its gradient as grad-cam's `reshape_transform` is; with "rollout" and "attention-gradient" it is
        given (N,L,1) for all tokens, and gives (N,1,h,w).
    control: "none", "permuted", "random", "inverted" or "uniform": how the map is changed afterwards, to test
        whether the CAM matters; see `part_fast.budgets.controls`. "permuted" and "random" draw from `generator`.
    clip: (low, high), what a pixel may be, as in `pgd`.
    generator: of random numbers, on any device, such as each thread's own; default: torch's, which are the process's.

    A call is batched: one eval-mode forward, and a backward from the logits to the target layer only (nothing
    before it records a graph). Of an AttackModel that captures CUDA graphs these are one launch, unless `target` is
    given. It leaves no trace: training mode, hooks, .grad, BatchNorm statistics and the
    random generators are as before, also after an exception. Calls for one model from several threads
    take turns. What other threads draw meanwhile stays drawn, unless the model itself draws; if something was drawn,
    one more forward tells by whom.

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
        rule: str | Rule = "zscore",
        target_layer: nn.Module | str | None = None,
        control: str = "none",
        clip: Clip = (0.0, 1.0),
        reshape: Reshape | None = None,
        generator: torch.Generator | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise BadTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._members = native_methods(method)
        if not self._members and method not in ATTENTION_METHODS:
            check_method(method, (*METHODS, "ensemble", *ATTENTION_METHODS))
        self.eps, self.eps_low = eps_pair(eps, eps_low)
        self._found_rule = find_rule(rule, self.eps, self.eps_low)
        self.channels = 3 if rule == "released" else 1
        self.clip = clip
        checks.image_units("eps", self.eps, clip, stacklevel=2)
        self.model = model
        self.method = method
        self.rule = rule
        self.control = check_control(control)
        if reshape is not None and not callable(reshape):
            raise BadTypeError(f"reshape must be a callable, got {type(reshape).__name__}")
        self.reshape = reshape
        if generator is not None and not isinstance(generator, torch.Generator):
            raise BadTypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        self.generator = generator
        if method in ATTENTION_METHODS and target_layer is not None:
            raise BadValueError(
                f"target_layer must not be given with method {method}, which reads every block's attention"
            )
        self._patches_read = False
        needs_none = target_layer is None and (
            method in ATTENTION_METHODS or (callable(method) and not isinstance(method, type))
        )
        self._asked, self._ran = target_layer, _run(model)
        self.target_layer = None if needs_none else _find_layer(model, target_layer)

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Eps map (N,M,H,W) of the images x (N,C,H,W) within clip.

        target: class indices (N,) to explain; default: the model's prediction.
        """
        return self.with_logits(x, target)[0]

    def with_logits(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The eps map, and the eval-mode logits (N,classes) of the forward that it came from, detached.

        For losses that need the clean logits anyway, such as TRADES.
        """
        with record_function("part_fast: CAM"):
            evidence, logits = self.evidence(x, target)
            if isinstance(self._found_rule, str):
                eps = epsilon_map(evidence, (x.shape[2], x.shape[3]), self.eps, self.eps_low, self._found_rule).float()
            else:
                if target is None:
                    target = logits.argmax(1) if len(x) else logits.new_empty(0, dtype=torch.int64)
                weights = rule_weights(self._found_rule, evidence, x, target).float()
                low, high = (torch.full((), value, device=weights.device) for value in (self.eps_low, self.eps))
                eps = torch.lerp(low, high, weights)  # exactly eps_low at 0 and eps at 1
            return control_map(eps, self.control, self.eps, self.eps_low, self.generator), logits

    def packed(self, x: Tensor, target: Tensor | None = None) -> PackedEpsilon:
        """The eps map as one bit per value: what a call gives, by the rules of two values ("zscore",
        "released", "quantile:q") and every control but "uniform"."""
        rule = self.mask_rule()
        if self.control == "uniform":
            raise BadValueError(
                "control must not be uniform in a packed map, which has two values: call the budget itself"
            )
        with record_function("part_fast: CAM"):
            evidence, _ = self.evidence(x, target)
            packed = packed_epsilon_map(evidence, (x.shape[2], x.shape[3]), self.eps, self.eps_low, rule)
            if self.control == "none":
                return packed
            mask = control_map(packed.mask().float(), self.control, 1.0, 0.0, self.generator) > 0.5
            return PackedEpsilon.pack(mask, self.eps, self.eps_low)

    def mask_rule(self) -> str:
        """The rule, if its maps are masks of two values. Errors: TypeError or ValueError for "soft" and functions."""
        parse_rule(self.rule, 1, 1, soft=False)
        return str(self.rule)

    def evidence(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The class activation maps (N,h,w), and the logits (N,classes) that they explain, detached."""
        x = checks.pixels("x", x, self.clip)
        if self.channels == 3 and x.shape[1] != 3:
            raise BadValueError(
                f"rule released must have images of 3 channels, whose colours it masks, got {x.shape[1]}"
            )
        if target is not None:
            checks.labels("target", target, x)
        if x.shape[0] == 0:  # layers disagree on empty batches
            return x.new_empty(0, 1, 1, dtype=torch.float32), x.new_empty(0, 0)
        model = unwrapped(self.model)
        turn = _turns.setdefault(model, threading.RLock())

        def forward() -> None:
            with turn, torch.no_grad(), uncached_autocast(), eval_mode(model):
                model(x.clone())

        # Methods of others may draw beside the model.
        native = isinstance(self.method, str)
        put_back = draws_put_back(model, x.device, forward) if native else generators_put_back(x.device)
        with put_back, turn, torch.inference_mode(False), eval_mode(model):
            x = x.clone().detach()  # some models normalise in place
            if not isinstance(self.method, str):
                return self._external(self.method, model, x, target)
            if isinstance(model, AttackModel):
                # Refreshed before the hook is set: a refresh in the forward would replace the hooked copy.
                model.refresh_if_changed()
            if not self._members:
                return attention_maps(self.method, model, x, target, self.reshape)
            if isinstance(model, AttackModel) and _run(model) is not self._ran:
                self.target_layer, self._ran = _find_layer(model, self._asked), _run(model)
            if isinstance(model, AttackModel) and model.graphs is not None and target is None:
                key = (self, self._members, self.target_layer, surroundings(model.module, x.device))
                maps, logits = model.graphs(key, functools.partial(self._native, model), x)
            else:
                maps, logits = self._native(model, x, target)
        return maps, logits

    def _native(self, model: nn.Module, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The maps by this package's own methods, and the logits: what is captured of an AttackModel with graphs."""
        output, logits = self._forward(model, x)
        target = _target(target, logits, x)
        with torch.enable_grad():
            score = logits.gather(1, target[:, None].clone()).sum()
        gradient = input_gradient(score, output)
        if gradient is None:
            raise BadValueError(
                "target_layer must lead to the logits, got a layer whose output they do not depend on, or only through "
                "what the model detaches or runs under its own no_grad: name a later layer"
            )
        activation = checks.dense(self._maps(output.detach(), model, x))
        # Pooling gives gradients that share elements (expanded), which ops refuse.
        gradient_maps = checks.same_format(self._maps(gradient.to(output.dtype), model, x), activation)
        if output.ndim == 3 and not self._patches_read and not capturing(x):
            self._check_patches(gradient, gradient_maps)
        maps = [cam(activation, gradient_maps, member) for member in self._members]
        return (maps[0] if len(maps) == 1 else ensemble(maps)), logits.detach()

    def _maps(self, output: Tensor, model: nn.Module, x: Tensor) -> Tensor:
        """The target layer's output, or the gradient for it, as maps (N,K,h,w)."""
        if self.reshape is not None:
            return reshaped(self.reshape, output, len(x))
        if output.ndim == 3:
            return token_maps(output, (x.shape[2], x.shape[3]), model, len(x), "target_layer")
        last = not _ends_in_convolution(self.target_layer) and _channels_are_last(output, x, model)
        return output.permute(0, 3, 1, 2) if last else output

    def _check_patches(self, gradient: Tensor, patches: Tensor) -> None:
        """Refuse a layer after the last attention, whose class token alone leads to the logits: its CAM says nothing.

        It is asked until patches were seen to lead there, on a GPU so that it waits in the first call alone.
        """
        self._patches_read = bool(patches.any())
        if not self._patches_read and bool(gradient.any()):
            names = {name: module for name, module in _copied(self.model).named_modules() if name}
            raise BadValueError(
                "target_layer must have patches that lead to the logits, got one after which the class token alone is "
                f"read; candidates: {_candidates(names)}"
            )

    def _external(
        self, method: type | Explain, model: nn.Module, x: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The maps of a method that part_fast does not have, and the logits."""
        with torch.no_grad(), uncached_autocast():
            logits = checks.logits(model(x), x)
        target = _target(target, logits, x).clone()
        layer = self.target_layer
        if isinstance(method, type) and isinstance(model, AttackModel):
            # grad-cam needs hooks for gradients, which a packed copy without gradients does not run.
            layer, model = _theirs(model, layer)
        with eval_mode(model):
            return external_cam(method, model, layer, x, target, lambda output: self._maps(output, model, x)), logits

    def _forward(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Target layer's output, a leaf of the graph that leads from it to the logits, and the logits."""
        found: list[Tensor] = []
        thread = threading.get_ident()

        def cut(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
            if threading.get_ident() != thread:  # the forward of another thread
                return None
            if not isinstance(output, Tensor) or (output.ndim not in (3, 4) and self.reshape is None):
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise BadValueError(f"target_layer must give a tensor (N,K,h,w), got {got}; tokens (N,L,K) will do too")
            self._maps(output.detach(), model, x)  # raises here and not after the forward
            torch.set_grad_enabled(True)  # until the no_grad block below ends
            found.append(output.detach().requires_grad_())
            return found[-1].clone()  # a leaf must not be overwritten, and an in-place ReLU may come next

        assert self.target_layer is not None
        handle = self.target_layer.register_forward_hook(cut)
        try:
            with torch.no_grad(), uncached_autocast():
                # A copy to attack has followed its model already.
                logits = model(x, follow=False) if isinstance(model, AttackModel) else model(x)
        finally:
            handle.remove()
        if not found:
            raise BadValueError("target_layer must be run by the model's forward, got a layer that was not")
        return found[-1], checks.logits(logits, x)


def _target(target: Tensor | None, logits: Tensor, x: Tensor) -> Tensor:
    """Class indices (N,): those given, checked, or the prediction."""
    return logits.detach().argmax(1) if target is None else checks.labels("target", target, x, logits.shape[1])


def _ends_in_convolution(layer: nn.Module | None) -> bool:
    """Whether the last layer with weights in it takes and gives (N,K,h,w)."""
    weighted = [m for m in layer.modules() if any(True for _ in m.parameters(recurse=False))] if layer else []
    return bool(weighted) and isinstance(weighted[-1], nn.Conv2d | nn.BatchNorm2d)


def _channels_are_last(output: Tensor, x: Tensor, model: nn.Module) -> bool:
    """Whether a layer's output is (N,h,w,K) rather than (N,K,h,w): maps have the images' proportions.

    Networks that keep channels last normalise or multiply them as the last dimension, which tells them from
    convolutional ones whose strides differ along height and width.
    Errors: ValueError where the output can be both.
    """
    height, width = x.shape[2:]
    a, b, c = output.shape[1:]

    def proportional(h: int, w: int) -> bool:
        return abs(h * width - w * height) <= max(height, width)  # to within one pixel

    if not (proportional(a, b) and a <= height and b <= width):
        return False
    normalised = any(getattr(module, "normalized_shape", None) == (c,) for module in model.modules())
    if not proportional(b, c):
        multiplied = any(isinstance(m, nn.Linear) and c in (m.in_features, m.out_features) for m in model.modules())
        return normalised or multiplied
    if normalised:
        raise BadValueError(
            f"target_layer must give a map that is plainly (N,K,h,w), got (N,{a},{b},{c}), which a model with a "
            f"LayerNorm of {c} can mean as (N,h,w,K): name another layer"
        )
    return False


def same_network(model: object, other: object) -> bool:
    """Whether both are one network of the user's, whatever is wrapped around it, or copied from it to be attacked."""
    return isinstance(model, nn.Module) and isinstance(other, nn.Module) and _copied(model) is _copied(other)


def _copied(model: nn.Module) -> nn.Module:
    """The user's own network: an AttackModel's source, without wrappers."""
    model = unwrapped(model)
    return _copied(model.source) if isinstance(model, AttackModel) else model


def _run(model: nn.Module) -> nn.Module:
    """The module that a forward of `model` runs, without wrappers: of an AttackModel, its copy."""
    model = unwrapped(model)
    return _run(model.module) if isinstance(model, AttackModel) else model


def _theirs(fast: AttackModel, layer: nn.Module | None) -> tuple[nn.Module, nn.Module]:
    """The layer of the copied model that corresponds to `layer` of the copy `fast`, and that model."""
    model, runs = _copied(fast), _run(fast)
    name = next(name for name, module in runs.named_modules() if module is layer)
    return model.get_submodule(name), model


def _find_layer(model: nn.Module, target_layer: nn.Module | str | None) -> nn.Module:
    """The module to hook, which the user names as in the model; of an AttackModel, its counterpart in the copy."""
    if isinstance(_copied(model), torch.jit.ScriptModule):
        raise BadTypeError("model must not be TorchScript, whose layers run no hooks: give the module it was made of")
    names = {name: module for name, module in _copied(model).named_modules() if name}
    name = _layer_name(model, names, target_layer)
    if name is None:
        assert isinstance(target_layer, nn.Module)
        return target_layer
    fast, folded = unwrapped(model), dict[str, str]()
    while isinstance(fast, AttackModel):
        folded |= dict(fast._pairs)
        fast = unwrapped(fast.source)
    if name in folded:
        raise BadValueError(
            f"target_layer must not be the convolution {name!r}, which the AttackModel has made one with its "
            f"BatchNorm: name that, {folded[name]!r}, or a later layer"
        )
    layer: nn.Module = dict(_run(model).named_modules())[name]
    if isinstance(layer, torch.jit.ScriptModule):
        raise BadValueError(
            "target_layer must be a module that takes hooks, got one of TorchScript: give the model as it was before "
            "torch.jit, or method=callable(model, x, target) -> maps (N,h,w)"
        )
    return layer


def _layer_name(model: nn.Module, names: dict[str, nn.Module], target_layer: nn.Module | str | None) -> str | None:
    """The target layer's name among `names`; None for a module that is the copy's own."""
    if isinstance(target_layer, nn.Module):
        found = next((name for name, module in names.items() if module is target_layer), None)
        if found is None and not any(module is target_layer for module in model.modules()):
            raise BadValueError(
                f"target_layer must be a module of the model, got another {type(target_layer).__name__}"
            )
        return found
    if isinstance(target_layer, str):
        plain = target_layer
        while plain not in names and plain.startswith(("module.", "_orig_mod.")):  # the name that a wrapper gives it
            plain = plain.partition(".")[2]
        if plain not in names:
            raise BadValueError(f"target_layer must be one of {_candidates(names)}, got {target_layer!r}")
        return plain
    if target_layer is not None:
        raise BadTypeError(f"target_layer must be a module or its name, got {type(target_layer).__name__}")
    for layer in DEFAULT_LAYERS:
        matches = [name for name in names if name.rpartition(".")[2] == layer]
        if len(matches) == 1:
            return matches[0]
    none = f"the model has no {' or '.join(DEFAULT_LAYERS)}"
    raise BadValueError(f"target_layer must be given (--target-layer), {none}; candidates: {_candidates(names)}")


def _candidates(names: dict[str, nn.Module]) -> str:
    """Names of the parts that hold convolutions, the deepest last, at most a line of them; without any, what to do."""
    convolutions = [name for name, module in names.items() if isinstance(module, nn.Conv2d)]
    tokens = any(isinstance(module, nn.LayerNorm | nn.MultiheadAttention) for module in names.values())
    patches = [name for name in convolutions if cuts_patches(names[name])]
    if tokens and patches == convolutions:
        norm = _before_last_attention(names)
        layers = f"{norm} (tokens), or " if norm else ""
        return (
            f"{layers}a layer whose output is (N,h,w,K), as the stages of Swin are; or give "
            f"method={' or '.join(map(repr, ATTENTION_METHODS))}, or callable(model, x, target) -> maps (N,h,w)"
        )
    if not convolutions:
        return "none, there is no convolution; give method=callable(model, x, target) -> maps (N,h,w)"
    prefix = ""
    while True:  # down to the module that holds several parts with convolutions
        parts = list(dict.fromkeys(name[len(prefix) :].partition(".")[0] for name in convolutions))
        if len(parts) > 1 or prefix + parts[0] in convolutions:
            return ", ".join(prefix + part for part in parts[-12:])
        prefix += f"{parts[0]}."


def _before_last_attention(names: dict[str, nn.Module]) -> str | None:
    """The name of the last block's first LayerNorm, after which every patch is still asked."""
    attention = [name for name, module in names.items() if "Attention" in type(module).__name__]
    block = attention[-1].rpartition(".")[0] if attention else ""
    return next((n for n, m in names.items() if n.startswith(f"{block}.") and isinstance(m, nn.LayerNorm)), None)


def native_methods(method: object) -> tuple[str, ...]:
    """The methods of `part_fast.cam` whose maps `method` is made of; none if it is of another kind."""
    if not isinstance(method, str):
        return ()
    if method == "ensemble":
        return METHODS
    name, colon, members = method.partition(":")
    chosen = tuple(members.split("+")) if name == "ensemble" and colon else (method,)
    return chosen if set(chosen) <= set(METHODS) else ()
