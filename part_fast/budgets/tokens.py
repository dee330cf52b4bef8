"""Transformers: maps of the image from tokens, and from the attention that they pay to each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from part_fast import checks
from part_fast.errors import BadTypeError, BadValueError
from part_fast.eval_mode import uncached_autocast

# Maps that are made of attention matrices, and need no target layer.
ATTENTION_METHODS = ("rollout", "attention-gradient")

Reshape = Callable[[Tensor], Tensor]

# How models name the tokens that stand before those of the patches; some count them in `num_prefix_tokens`.
PREFIX_TOKENS = (
    "cls_token",
    "class_token",
    "class_embedding",
    "dist_token",
    "distillation_token",
    "reg_token",
    "reg_tokens",
    "register_tokens",
)


class Layout(NamedTuple):
    """Where the patches are among the tokens of an image: `prefix` others, then h rows of w patches."""

    prefix: int
    h: int
    w: int


def layout(length: int, size: tuple[int, int], model: nn.Module, merged: bool = True) -> Layout | None:
    """How `length` tokens of images of size (H, W) are laid out; None where model and images do not say.

    The tokens before the patches' (class, distillation, registers) are as many as `num_prefix_tokens` says, else as the
    parameters in PREFIX_TOKENS hold; or none, where a class token joins later. The grid is that of the convolution that
    cuts the patches, or, where patches may have merged since, that one made smaller by 2, 4 or 8. Without such a
    convolution the grid has the images' proportions, as square patches make it.
    """
    height, width = size
    prefixes = list(dict.fromkeys((_prefix_tokens(model), 0)))
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None or not cuts_patches(conv):
        for prefix in prefixes:
            h = round(max((length - prefix) * height / width, 0) ** 0.5)
            w = h * width // height
            if h and h * w == length - prefix and h * width == w * height:
                return Layout(prefix, h, w)
        return None
    padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    spans = [side + 2 * pad for side, pad in zip(size, padding, strict=True)]
    whole = [span // stride for span, stride in zip(spans, conv.stride, strict=True)]
    filled = [
        -(-span // stride) for span, stride in zip(spans, conv.stride, strict=True)
    ]  # of images padded to patches
    for rows, columns in (whole, filled):
        for smaller in (1, 2, 4, 8) if merged else (1,):
            h, w = -(-rows // smaller), -(-columns // smaller)
            for prefix in prefixes:
                if prefix + h * w == length:
                    return Layout(prefix, h, w)
    return None


def _prefix_tokens(model: nn.Module) -> int:
    counts = (getattr(module, "num_prefix_tokens", None) for module in model.modules())
    told = next((count for count in counts if type(count) is int), None)
    if told is not None:
        return told
    named = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in PREFIX_TOKENS and p.numel()]
    return sum(parameter.numel() // parameter.shape[-1] for parameter in named)


def cuts_patches(module: nn.Module) -> bool:
    """Whether a convolution looks at each pixel once, in patches."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == module.stride != (1, 1)


def token_maps(
    tokens: Tensor, size: tuple[int, int], model: nn.Module, images: int, name: str, merged: bool = True
) -> Tensor:
    """Tokens (N,L,K) as maps (N,K,h,w), a view; those before the patches' are left out.

    size: (H, W) of the images. images: N. name: whose tokens they are, for the error. merged: see `layout`.
    Errors: ValueError where the tokens are not those of one image each, or their layout is not known.
    """
    ways = "give reshape=callable(tokens) -> maps (N,K,h,w), or another layer"
    n, length, channels = tokens.shape
    first = any(isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in model.modules())
    if n != images or (n == length and first):
        what = "can be tokens first" if n == images else "are not of one image each, but of windows or tokens first"
        raise BadValueError(
            f"{name} must give tokens ({images},L,K), got ({n},{length},{channels}), which {what}: {ways}"
        )
    found = layout(length, size, model, merged)
    if found is None:
        prefix = _prefix_tokens(model)
        raise BadValueError(
            f"{name} must give tokens of a grid of patches, got {length} tokens with {prefix} before the patches' for "
            f"images of {size[0]}x{size[1]}: {ways}"
        )
    return tokens[:, found.prefix :].reshape(n, found.h, found.w, channels).permute(0, 3, 1, 2)


def reshaped(reshape: Reshape, value: Tensor, images: int) -> Tensor:
    """What the user's `reshape` makes of a layer's output. Errors: ValueError if that is no maps (N,K,h,w)."""
    maps = checks.tensor("the result of reshape", reshape(value))
    if maps.ndim != 4 or maps.shape[0] != images or 0 in maps.shape:
        raise BadValueError(f"reshape must give maps ({images},K,h,w), got {tuple(maps.shape)}")
    return maps


def attention_maps(
    method: str, model: nn.Module, x: Tensor, target: Tensor | None, reshape: Reshape | None = None
) -> tuple[Tensor, Tensor]:
    """Maps (N,h,w), float32, non-negative, and logits (N,classes), detached, of images x (N,C,H,W); model in eval mode.

    With A_b the attention of block b after its softmax, (heads,L,L), and e the tokens that the logits are read from:
    rollout             e (A_B + I)/2 ... (A_1 + I)/2, of the means of A_b over the heads
                        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 4
    attention-gradient  e (I + G_B) ... (I + G_1), G_b the mean over the heads of relu(A_b * dscore/dA_b)
                        Chefer et al., "Generic Attention-model Explainability", ICCV 2021, eq. 5 and 6
    at the patches' tokens. e is one, shared among the tokens whose attention in the last block the score depends on:
    the class token alone, or class and distillation token, or every token that is pooled. An image whose score depends
    on none gets a map of zeros, no evidence.
    target: class indices (N,); default: the prediction.

    One forward that computes every softmax(q k) in the open, whatever the model calls for it
    (scaled_dot_product_attention, nn.MultiheadAttention, a softmax of its own), through torch's function mode of this
    thread: nothing of the model is touched. It keeps the attention of every block, (N,heads,L,L), and what a backward
    to the first one needs.
    Errors: ValueError for attention of windows, between different tokens, or out of sight.
    """
    _refuse_hidden(method, model)
    seen = _AttentionSeen(method, len(x))
    with torch.no_grad(), uncached_autocast(), seen:
        logits = checks.logits(model(x), x)
    if not seen.weights or not all(weights.requires_grad for weights in seen.weights):
        got = "none" if not seen.weights else "some under a no_grad of the model's own"
        raise BadValueError(
            f"method {method} must find attention by softmax in the model, got {got}: take another method"
        )
    chosen = logits.detach().argmax(1) if target is None else checks.labels("target", target, x, logits.shape[1])
    wanted = seen.weights if method == "attention-gradient" else seen.weights[-1:]
    with torch.enable_grad():
        score = logits.gather(1, chosen[:, None].clone()).sum()
    gradients: tuple[Tensor | None, ...] = (None,)
    if score.requires_grad:
        try:
            gradients = torch.autograd.grad(score, wanted, allow_unused=True)
        except CheckpointError as error:  # what runs again computes its attention out of sight
            raise BadValueError(
                f"method {method} must see each block's attention once, got blocks that checkpoint: switch it off for "
                "the budget's model"
            ) from error
    if any(gradient is None for gradient in gradients):
        raise BadValueError(f"method {method} must have every attention lead to the logits: take another method")

    blocks = [
        weights.detach().unflatten(0, (len(x), -1)) if weights.ndim == 3 else weights.detach()
        for weights in seen.weights
    ]
    slopes = [g.view_as(a).float() for g, a in zip(gradients, blocks[-len(gradients) :], strict=True) if g is not None]
    read = (slopes[-1] != 0).any(3).any(1).float()[:, None]
    row = read / read.sum(2, keepdim=True).clamp(min=1)  # (N,1,L)
    for block in reversed(range(len(blocks))):
        weights = blocks[block].float()
        if method == "rollout":
            row = (row @ weights.mean(1) + row) / 2
        else:
            row = row + row @ (weights * slopes[block]).relu().mean(1)
    tokens = row.mT
    if reshape is None:
        maps = token_maps(tokens, (x.shape[2], x.shape[3]), model, len(x), f"method {method}", merged=False)
    else:
        maps = reshaped(reshape, tokens, len(x))
    return maps[:, 0].contiguous(), logits.detach()


def _refuse_hidden(method: str, model: nn.Module) -> None:
    """Errors: ValueError for a model that has parts which run without torch's function modes seeing what they do."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise BadValueError(
                f"method {method} must see the attention, got TorchScript: give the model it was made of"
            )
        if module._compiled_call_impl is not None or isinstance(getattr(module, "_orig_mod", None), nn.Module):
            raise BadValueError(
                f"method {method} must see the attention, got a compiled {type(module).__name__} in the model: compile "
                "the whole by torch.compile(model) or AttackModel(model, compile=True)"
            )


_SOFTMAX = (F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax)


class _AttentionSeen(TorchFunctionMode):
    """Keeps every attention matrix that the forwards of this thread compute, as part of their graph.

    weights: (N,heads,L,L) or (N*heads,L,L), the first of them a leaf: what comes before it records no graph.
    """

    def __init__(self, method: str, images: int) -> None:
        super().__init__()
        self.method, self.images = method, images
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Inside of this method the mode is off.
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            return self._multi_head(**bound.arguments)
        result = func(*args, **kwargs)
        return self._keep(result) if func in _SOFTMAX and result.ndim > 2 else result

    def _keep(self, weights: Tensor) -> Tensor:
        n, *_, queries, keys = weights.shape
        alike = not self.weights or self.weights[0].shape[-1] == keys
        whole = n == self.images if weights.ndim == 4 else n % self.images == 0
        if weights.ndim > 4 or queries != keys or not whole or not alike:
            raise BadValueError(
                f"method {self.method} must have attention from all tokens to all, the same in every block, got "
                f"weights {tuple(weights.shape)} for {self.images} images, as of windows or pooling: take gradcam "
                "with a target_layer"
            )
        if not self.weights:
            torch.set_grad_enabled(True)  # until the no_grad block around the forward ends
            weights = weights.detach().requires_grad_()
        self.weights.append(weights)
        return weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`F.scaled_dot_product_attention` written out, without the dropout that eval mode has not."""
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        return self._weigh(query, key, attn_mask, scale).to(value.dtype) @ value

    def _weigh(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
        """softmax(scale q k' + mask), in float32 at least. mask: True or 0 shows, False or -inf hides."""
        scores = query @ key.mT
        scores = scores.to(checks.compute_dtype(scores)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return self._keep(scores.softmax(-1))

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`F.multi_head_attention_forward` of tokens first (L,N,K), written out."""
        unusual = [
            name for name in ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v") if rest[name] is not None
        ]
        if unusual or rest["add_zero_attn"] or query.ndim != 3:
            what = unusual[0] if unusual else "add_zero_attn" if rest["add_zero_attn"] else "tokens without a batch"
            raise BadTypeError(
                f"method {self.method} must have plain self-attention, got nn.MultiheadAttention with {what}"
            )
        if rest["use_separate_proj_weight"]:
            projections = [rest[f"{name}_proj_weight"] for name in "qkv"]
        else:
            assert in_proj_weight is not None
            projections = list(in_proj_weight.chunk(3))
        biases = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(tokens, weight, bias).unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3)
            for tokens, weight, bias in zip((query, key, value), projections, biases, strict=True)
        )  # (N,heads,L,K/heads)
        mask = rest["attn_mask"]
        if mask is not None:
            mask = (
                ~mask if mask.dtype == torch.bool else mask
            )  # True hides here, and shows in scaled_dot_product_attention
            mask = mask.unflatten(0, (-1, num_heads)) if mask.ndim == 3 else mask
        weights = self._weigh(q, k, mask)
        output = (weights.to(v.dtype) @ v).permute(2, 0, 1, 3).flatten(2)
        output = F.linear(output, out_proj_weight, out_proj_bias)
        if not rest["need_weights"]:
            return output, None
        return output, weights.mean(1) if rest["average_attn_weights"] else weights
