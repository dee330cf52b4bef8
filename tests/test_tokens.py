"""Transformers: token maps against grad-cam and by hand, attention methods against matrix products, layouts, errors."""

import threading

import pytest
import torch
import torch.nn.functional as F
from golden_attack import assert_untouched, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import part_fast
from part_fast import AttackModel, CamBudget
from part_fast.budgets.tokens import Layout, attention_maps, layout

SIZE, PATCH, WIDTH, HEADS, CLASSES = 32, 8, 16, 2, 5
CAMS = ("gradcam", "xgradcam", "layercam", "hirescam")


def images(n=3, height=SIZE, width=SIZE):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def timm_vit(kind="VisionTransformer", **changes):
    timm = pytest.importorskip("timm", reason="the timm package is not installed")
    torch.manual_seed(0)
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
    module = timm.models.deit if "Distilled" in kind else timm.models.vision_transformer
    return spread(getattr(module, kind)(**{**sizes, "num_classes": CLASSES, **changes}))


def torchvision_vit(**changes):
    torchvision = pytest.importorskip("torchvision", reason="the torchvision package is not installed")
    torch.manual_seed(0)
    return spread(
        torchvision.models.VisionTransformer(SIZE, PATCH, 2, HEADS, WIDTH, 32, num_classes=CLASSES, **changes)
    )


def spread(model):
    """Weights large enough for attention that differs between tokens; a fresh ViT's is flat, its head may be zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.eval()


VITS = {
    "torchvision": (torchvision_vit, "encoder.layers.encoder_layer_1.ln_1", 1),
    "timm": (timm_vit, "blocks.1.norm1", 1),
    "timm, averaged": (lambda: timm_vit(global_pool="avg", class_token=False, fc_norm=True), "blocks.1.norm1", 0),
    "timm, registers": (lambda: timm_vit(reg_tokens=3), "blocks.1.norm1", 4),
    "DeiT, distilled": (lambda: timm_vit("VisionTransformerDistilled"), "blocks.1.norm1", 2),
}


@pytest.fixture(params=VITS)
def vit(request):
    make, layer, prefix = VITS[request.param]
    return make(), layer, prefix


def by_hand(tokens, prefix, h=4, w=4):
    return tokens[:, prefix:].unflatten(1, (h, w)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("method", CAMS)
def test_token_cams_equal_the_formula_on_patches(vit, method):
    model, layer, prefix = vit
    x = images()
    kept = {}
    hook = model.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.update(out=out))
    logits = model(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), kept["out"])
    a, g = (by_hand(value, prefix).detach() for value in (kept["out"], gradient))
    weights = {
        "gradcam": g.mean((2, 3), keepdim=True),
        "xgradcam": (g * a).sum((2, 3), keepdim=True) / (a + 1e-8).sum((2, 3), keepdim=True),
        "layercam": g.relu(),
        "hirescam": g,
    }[method]
    got, _ = CamBudget(model, method=method, target_layer=layer).evidence(x)
    expected = (weights * a).sum(1).relu()
    assert got.shape == (3, 4, 4)
    assert got.any()
    # Both are float32 sums of 16 channels in another order; xgradcam divides by sums that may nearly cancel.
    torch.testing.assert_close(got, expected, atol=1e-4 if method == "xgradcam" else 1e-6, rtol=1e-3)


@pytest.mark.parametrize("theirs", ["GradCAM", "LayerCAM", "HiResCAM"])
def test_equal_to_grad_cam_with_its_reshape_transform(vit, theirs):
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    model, layer, prefix = vit
    x = images()

    def reshape(tokens):
        return by_hand(tokens, prefix)

    kind = getattr(grad_cam, theirs)
    with kind(model=model, target_layers=[model.get_submodule(layer)], reshape_transform=reshape) as explain:
        own = torch.from_numpy(explain(input_tensor=x, targets=None))
    native, _ = CamBudget(model, method=theirs.lower(), target_layer=layer).evidence(x)
    # The package stretches a map to [0,1] with 1e-7 added to its range and enlarges it bilinearly, by OpenCV.
    low = native.amin((1, 2), keepdim=True)
    unit = (native - low) / (native.amax((1, 2), keepdim=True) - low)
    large = F.interpolate(unit[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    large = (large - large.amin((1, 2), keepdim=True)) / large.sub(large.amin((1, 2), keepdim=True)).amax(
        (1, 2), keepdim=True
    )
    torch.testing.assert_close(own, large, atol=2e-4, rtol=0)
    # The class itself as the method: its output is taken, with the layout that was found.
    got, _ = CamBudget(model, method=kind, target_layer=layer).evidence(x)
    torch.testing.assert_close(got, own, atol=1e-6, rtol=0)
    told, _ = CamBudget(model, method=theirs.lower(), target_layer=layer, reshape=reshape).evidence(x)
    assert torch.equal(told, native)


def attention_by_hand(model, x):
    """Logits and every block's attention, by a second implementation in the place of each block's forward."""
    blocks = model.blocks if hasattr(model, "blocks") else model.encoder.layers
    weights = []

    def replace(block):
        def forward(tokens, *args, **kwargs):
            attn = block.attn if hasattr(block, "attn") else block.self_attention
            linear = (
                (attn.qkv.weight, attn.qkv.bias) if hasattr(attn, "qkv") else (attn.in_proj_weight, attn.in_proj_bias)
            )
            n, length, _ = tokens.shape
            q, k, v = F.linear(tokens, *linear).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            weights.append((q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1))
            out = (weights[-1] @ v).transpose(1, 2).reshape(n, length, -1)
            if hasattr(attn, "qkv"):
                return attn.proj(out)
            return attn.out_proj(out), None

        return forward

    attns = [block.attn if hasattr(block, "attn") else block.self_attention for block in blocks]
    for attn, block in zip(attns, blocks, strict=True):
        attn.forward = replace(block)
    logits = model(x)
    for attn in attns:
        del attn.forward
    return logits, weights


def readers(prefix, length):
    """The row that the logits are read from, as a distribution over tokens."""
    row = torch.zeros(length)
    row[{0: slice(None), 2: slice(0, 2)}.get(prefix, slice(0, 1))] = 1
    return row / row.sum()


def test_attention_methods_equal_products_of_matrices(vit):
    model, _, prefix = vit
    x = images()
    logits, weights = attention_by_hand(model, x)
    gradients = torch.autograd.grad(logits.amax(1).sum(), weights)
    length = weights[0].shape[-1]
    row, eye = readers(prefix, length), torch.eye(length)
    rollout, chefer = eye.expand(3, -1, -1), eye.expand(3, -1, -1)
    for a, g in zip(weights, gradients, strict=True):
        mixed = a.mean(1) + eye
        rollout = mixed / mixed.sum(-1, keepdim=True) @ rollout
        chefer = chefer + (a * g).clamp(min=0).mean(1) @ chefer
    for method, product in (("rollout", rollout), ("attention-gradient", chefer)):
        expected = (row @ product)[:, prefix:].view(3, 4, 4)
        got, same = CamBudget(model, method=method).evidence(x)
        torch.testing.assert_close(same, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got, expected.detach(), atol=1e-6, rtol=1e-4)
        assert (got.amax((1, 2)) > got.amin((1, 2))).all()


def test_attention_gradient_depends_on_the_class_and_rollout_does_not():
    model, x = timm_vit(), images()
    maps = {
        method: [CamBudget(model, method=method).evidence(x, torch.full((3,), c))[0] for c in (0, 1)]
        for method in ("rollout", "attention-gradient")
    }
    assert torch.equal(*maps["rollout"])
    assert not torch.allclose(*maps["attention-gradient"])


@pytest.mark.parametrize("method", ["gradcam", "rollout", "attention-gradient"])
def test_fused_and_plain_attention_give_the_same_maps(method):
    model, x = timm_vit(), images()
    layer = "blocks.1.norm1" if method == "gradcam" else None
    budget = CamBudget(model, method=method, target_layer=layer)
    fused, _ = budget.evidence(x)
    assert model.blocks[0].attn.fused_attn
    for block in model.blocks:
        block.attn.fused_attn = False
    plain, _ = budget.evidence(x)
    torch.testing.assert_close(plain, fused, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["gradcam", "layercam", "rollout", "attention-gradient"])
def test_a_permuted_batch_gives_permuted_maps(vit, method):
    model, layer, _ = vit
    budget = CamBudget(model, rule="soft", method=method, target_layer=layer if "cam" in method else None)
    x, order = images(5), torch.tensor([3, 0, 4, 1, 2])
    # Sums inside of a matrix product may take another order in another place.
    torch.testing.assert_close(budget(x[order]), budget(x)[order], atol=1e-6, rtol=1e-4)
    one_by_one = torch.cat([budget(image[None]) for image in x])
    torch.testing.assert_close(one_by_one, budget(x), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["gradcam", "rollout", "attention-gradient"])
def test_images_that_are_not_square(method):
    model = timm_vit(img_size=(16, 48))
    x = images(2, 16, 48)
    budget = CamBudget(model, method=method, target_layer="blocks.1.norm1" if method == "gradcam" else None)
    got, _ = budget.evidence(x)
    assert got.shape == (2, 2, 6)
    assert budget(x).shape == (2, 1, 16, 48)


def test_patches_that_are_not_square_and_padded_images():
    assert layout(17, (32, 32), timm_vit(patch_size=(4, 16))) == Layout(1, 8, 2)
    padded = timm_vit(dynamic_img_pad=True, dynamic_img_size=True)
    x = images(2, 30, 36)
    got, _ = CamBudget(padded, method="rollout").evidence(x)
    assert got.shape == (2, 4, 5)


@pytest.mark.parametrize("make", [torchvision_vit, timm_vit])
@pytest.mark.parametrize("method", ["gradcam", "rollout", "attention-gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attack_models(make, method, precision):
    model, x = make(), images()
    layer = next(layer for maker, layer, _ in VITS.values() if maker is make) if method == "gradcam" else None
    plain, logits = CamBudget(model, method=method, target_layer=layer).evidence(x)
    got, _ = CamBudget(AttackModel(model, precision=precision), method=method, target_layer=layer).evidence(x)
    assert got.dtype == torch.float32
    # bf16 has 8 bits: the maps of two blocks of random weights keep their order roughly.
    tolerance = 1e-5 if precision == "fp32" else 0.25 * float(plain.max())
    torch.testing.assert_close(got, plain, atol=tolerance, rtol=1e-3 if precision == "fp32" else 0.1)
    x_adv = part_fast.pgd(AttackModel(model), x, logits.argmax(1), 0.03, 0.01, 2, start="zero")
    torch.testing.assert_close(x_adv, part_fast.pgd(model, x, logits.argmax(1), 0.03, 0.01, 2, start="zero"))


@pytest.mark.parametrize("method", ["gradcam", "rollout", "attention-gradient"])
def test_bf16_models(method):
    model = timm_vit()
    layer = "blocks.1.norm1" if method == "gradcam" else None
    wide, _ = CamBudget(model, method=method, target_layer=layer).evidence(images())
    narrow, _ = CamBudget(model.bfloat16(), method=method, target_layer=layer).evidence(images().bfloat16())
    assert narrow.dtype == torch.float32
    for a, b in zip(wide, narrow, strict=True):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("method", ["gradcam", "rollout", "attention-gradient"])
@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(vit, method, training):
    model, layer, _ = vit
    model.train(training)
    model.zero_grad()
    out = model(images())
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    before = snapshot(model)
    flags = [dict(vars(module)) for module in model.modules()]
    CamBudget(model, method=method, target_layer=layer if method == "gradcam" else None)(images())
    assert_untouched(before, model)
    assert [dict(vars(module)) for module in model.modules()] == flags


@pytest.mark.parametrize("method", ["gradcam", "rollout", "attention-gradient"])
def test_leaves_no_trace_after_an_exception(method):
    model = timm_vit().train()

    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("planned")

    model.head_drop = Failing()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="planned"):
        CamBudget(model, method=method, target_layer="blocks.1.norm1" if method == "gradcam" else None)(images())
    assert_untouched(before, model)
    assert torch.is_grad_enabled()
    assert F.softmax(torch.zeros(2, 2, 2, 2), -1).grad_fn is None


def test_other_threads_attention_is_not_seen():
    model, x = timm_vit(), images()
    expected, _ = CamBudget(model, method="rollout").evidence(x)
    other = timm_vit(num_heads=4)
    stop = threading.Event()

    def forwards():
        while not stop.is_set():
            other(images(7))

    thread = threading.Thread(target=forwards)
    thread.start()
    try:
        got = [CamBudget(model, method="rollout").evidence(x)[0] for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(one, expected) for one in got)


@pytest.mark.parametrize(
    ("reentrant", "said"), [(False, "blocks that checkpoint"), (True, "a no_grad of the model's own")]
)
def test_blocks_that_checkpoint_are_refused(reentrant, said):
    model, x = timm_vit(depth=3), images()
    expected, _ = CamBudget(model, target_layer="blocks.2.norm1").evidence(x)
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda x, plain=plain, **kwargs: checkpoint(plain, x, use_reentrant=reentrant)
    with pytest.raises(ValueError, match=f"method attention-gradient must .*{said}") as error:
        CamBudget(model, method="attention-gradient")(x)
    assert "\n" not in str(error.value)
    if not reentrant:
        torch.testing.assert_close(CamBudget(model, target_layer="blocks.2.norm1").evidence(x)[0], expected)


def swin(kind):
    torch.manual_seed(0)
    if kind == "torchvision":
        torchvision = pytest.importorskip("torchvision", reason="the torchvision package is not installed")
        model = torchvision.models.SwinTransformer([4, 4], WIDTH, [2, 2], [2, 2], [4, 4], num_classes=CLASSES)
        return spread(model), "features.3"
    timm = pytest.importorskip("timm", reason="the timm package is not installed")
    model = timm.models.SwinTransformer(
        img_size=SIZE,
        patch_size=4,
        embed_dim=WIDTH,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
        num_classes=CLASSES,
    )
    return spread(model), "layers.1"


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
def test_swin(kind):
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    model, layer = swin(kind)
    x = images()

    def last(output):
        return output.permute(0, 3, 1, 2)

    with grad_cam.GradCAM(model=model, target_layers=[model.get_submodule(layer)], reshape_transform=last) as explain:
        own = torch.from_numpy(explain(input_tensor=x, targets=None))
    theirs, _ = CamBudget(model, method=grad_cam.GradCAM, target_layer=layer).evidence(x)
    torch.testing.assert_close(theirs, own, atol=1e-6, rtol=0)
    native, _ = CamBudget(model, target_layer=layer).evidence(x)
    told, _ = CamBudget(model, target_layer=layer, reshape=last).evidence(x)
    assert native.shape == (3, 4, 4)
    assert torch.equal(native, told)
    for method in ("rollout", "attention-gradient"):
        with pytest.raises(
            ValueError, match=rf"method {method} must have attention from all tokens .*windows.*gradcam"
        ):
            CamBudget(model, method=method)(x)
    windows = next(name for name, module in model.named_modules() if name.endswith("attn.proj"))
    if kind == "timm":
        with pytest.raises(ValueError, match=r"target_layer must give tokens \(3,L,K\), got \(12,16,16\), .*windows"):
            CamBudget(model, target_layer=windows)(x)


class Tokens(nn.Module):
    """Patches by a linear layer, tokens first, read from their mean; a prefix of `k` tokens if asked."""

    def __init__(self, k=0, name="cls_token"):
        super().__init__()
        self.embed, self.head = nn.Linear(3 * PATCH * PATCH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.block = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=False)
        if k:
            self.register_parameter(name, nn.Parameter(torch.randn(1, k, WIDTH)))
        self.k, self.name = k, name

    def forward(self, x):
        tokens = F.unfold(x, PATCH, stride=PATCH).permute(2, 0, 1)
        tokens = self.embed(tokens)
        if self.k:
            tokens = torch.cat([getattr(self, self.name).expand(len(x), -1, -1).transpose(0, 1), tokens])
        return self.head(self.block(tokens).mean(0))


def test_tokens_first_need_reshape():
    torch.manual_seed(0)
    model, x = Tokens().eval(), images()
    with pytest.raises(ValueError, match=r"target_layer must give tokens \(3,L,K\), got \(16,3,16\), .*reshape="):
        CamBudget(model, target_layer="embed")(x)
    with pytest.raises(ValueError, match=r"which can be tokens first: give reshape="):
        CamBudget(model, target_layer="embed")(images(16))
    got, _ = CamBudget(
        model, target_layer="embed", reshape=lambda tokens: tokens.permute(1, 2, 0).unflatten(2, (4, 4))
    ).evidence(x)
    kept = {}
    hook = model.embed.register_forward_hook(lambda m, a, out: kept.update(out=out))
    score = model(x).amax(1).sum()
    hook.remove()
    (gradient,) = torch.autograd.grad(score, kept["out"])
    expected = (gradient.mean(0) * kept["out"]).sum(2).relu().T.reshape(3, 4, 4)
    torch.testing.assert_close(got, expected.detach(), atol=1e-6, rtol=1e-4)
    rollout, _ = CamBudget(model, method="rollout").evidence(x)  # nn.MultiheadAttention gets them tokens first
    assert rollout.shape == (3, 4, 4)


@pytest.mark.parametrize(("k", "name"), [(1, "cls_token"), (4, "register_tokens"), (2, "class_token")])
def test_prefix_tokens_by_their_parameters(k, name):
    assert layout(16 + k, (SIZE, SIZE), Tokens(k, name)) == Layout(k, 4, 4)


def test_layouts_that_are_not_known():
    model = timm_vit()
    assert layout(17, (SIZE, SIZE), model) == Layout(1, 4, 4)
    assert layout(16, (SIZE, SIZE), model) == Layout(0, 4, 4)  # the class token joins later
    assert layout(5, (SIZE, SIZE), model) == Layout(1, 2, 2)  # merged
    assert layout(5, (SIZE, SIZE), model, merged=False) is None
    assert layout(18, (SIZE, SIZE), model) is None
    assert layout(9, (SIZE, SIZE), Tokens(7, "memory")) == Layout(0, 3, 3)
    assert layout(12, (24, 32), Tokens()) == Layout(0, 3, 4)
    assert layout(12, (32, 32), Tokens()) is None


def test_tokens_of_no_grid_are_refused():
    class Odd(Tokens):
        def forward(self, x):
            return super().forward(F.pad(x, (0, PATCH)))

    with pytest.raises(ValueError, match=r"method rollout must give tokens of a grid .* 20 tokens with 0 .*reshape="):
        CamBudget(Odd(), method="rollout")(images())
    got, _ = CamBudget(Odd(), method="rollout", reshape=lambda t: t.mT.unflatten(2, (4, 5))[..., :4]).evidence(images())
    assert got.shape == (3, 4, 4)
    with pytest.raises(ValueError, match=r"reshape must give maps \(3,K,h,w\), got \(3, 20, 1\)"):
        CamBudget(Odd(), method="rollout", reshape=lambda tokens: tokens)(images())
    with pytest.raises(TypeError, match="reshape must be a callable, got int"):
        CamBudget(Odd(), method="rollout", reshape=4)


@pytest.mark.parametrize("make", [torchvision_vit, timm_vit])
def test_a_layer_whose_class_token_alone_is_read_is_refused(make):
    model = make()
    last = "encoder.ln" if make is torchvision_vit else "norm"
    before = "encoder.layers.encoder_layer_1.ln_1" if make is torchvision_vit else "blocks.1.norm1"
    with pytest.raises(ValueError, match=rf"class token alone is read; candidates: {before} \(tokens\)"):
        CamBudget(model, target_layer=last)(images())
    assert CamBudget(model, target_layer=before)(images()).shape == (3, 1, SIZE, SIZE)


def test_no_layer_given_names_candidates():
    with pytest.raises(
        ValueError, match=r"candidates: blocks\.1\.norm1 \(tokens\), .*'rollout' or 'attention-gradient'"
    ):
        CamBudget(timm_vit())


def test_a_zero_head_is_no_evidence():
    model = timm_vit()
    nn.init.zeros_(model.head.weight)
    for method, layer in (("gradcam", "blocks.1.norm1"), ("rollout", None), ("attention-gradient", None)):
        eps = CamBudget(model, 0.2, 0.1, method=method, target_layer=layer)(images())
        assert torch.equal(eps, torch.full_like(eps, 0.1)), method


def test_refusals():
    model = timm_vit()
    with pytest.raises(ValueError, match="target_layer must not be given with method rollout"):
        CamBudget(model, method="rollout", target_layer="blocks.1.norm1")
    with pytest.raises(ValueError, match=r"method must be one of gradcam, .*ensemble, rollout, attention-gradient"):
        CamBudget(model, method="attention")
    torch.manual_seed(0)
    network = part_fast.models.resnet18()
    with pytest.raises(ValueError, match="method rollout must find attention by softmax in the model, got none"):
        CamBudget(network, method="rollout")(images(1))
    model.blocks[1].compile()
    with pytest.raises(ValueError, match="method rollout must see the attention, got a compiled Block"):
        CamBudget(model, method="rollout")(images())
    pooled = timm_vit(global_pool="map")
    with pytest.raises(ValueError, match="method attention-gradient must have attention from all tokens to all"):
        CamBudget(pooled, method="attention-gradient")(images())


def test_attention_maps_of_masks_and_heads_of_multi_head_attention():
    """nn.MultiheadAttention written out gives its own output: masks, separate projections, weights asked for."""
    torch.manual_seed(0)
    x = images()

    class Model(nn.Module):
        def __init__(self, **kwargs):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.Linear(WIDTH, CLASSES)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **kwargs)
            self.mask = None

        def forward(self, x):
            tokens = self.embed(x).flatten(2).mT
            out, weights = self.attention(tokens, tokens, tokens, attn_mask=self.mask)
            return self.head(out.mean(1)) + weights.sum()

    for kwargs in ({}, {"kdim": WIDTH, "vdim": WIDTH, "bias": False}):
        model = Model(**kwargs).eval()
        for mask in (None, torch.ones(16, 16, dtype=torch.bool).triu(1), torch.randn(3 * HEADS, 16, 16)):
            model.mask = mask
            maps, logits = attention_maps("rollout", model, x, None)
            torch.testing.assert_close(logits, model(x).detach(), atol=1e-5, rtol=1e-5)
            _, weights = model.attention(*[model.embed(x).flatten(2).mT] * 3, attn_mask=mask)
            expected = ((weights + torch.eye(16)) / 2).mean(1).view(3, 4, 4)
            torch.testing.assert_close(maps, expected.detach(), atol=1e-6, rtol=1e-4)
    with pytest.raises(TypeError, match=r"method rollout must have plain self-attention, .* with bias_k"):
        attention_maps("rollout", Model(add_bias_kv=True).eval(), x, None)
