"""uniform_start: the generator against its published answers, the noise against a numpy oracle, bit for bit."""

import numpy as np
import pytest
import torch
from conftest import (
    BAD_EPS,
    BAD_IMAGES,
    EPS,
    LAYOUTS,
    STRIDED,
    assert_error,
    assert_format,
    assert_same,
    compute_dtype,
    dtypes,
    image_shapes,
    lay,
    make_eps,
    neighbours_untouched,
    on_device,
    pairs,
    strided,
    with_nan,
)
from torch import Tensor

from part_fast import uniform_start
from part_fast.ops.uniform_start import philox

WORD = np.uint64(0xFFFFFFFF)
SEEDS = (0, 1, 2**31, 2**32 + 5, 2**63 - 1)
# Counter, key and words of Philox4x32-10 among the known answers that its authors publish with Random123.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text):
    return [int(word, 16) for word in text.split()]


def random_words(counter, key):
    """Philox4x32-10 in unsigned 64-bit numpy: (..., 4) from a list of four counter words and two key words."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        left, right = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = np.uint64(32)
        c = [right >> high ^ c[1] ^ k[0], right & WORD, left >> high ^ c[3] ^ k[1], left & WORD]
        k = [(k[0] + np.uint64(0x9E3779B9)) & WORD, (k[1] + np.uint64(0xBB67AE85)) & WORD]
    return np.stack(np.broadcast_arrays(*c), -1)


def uniform(x, seed):
    """u for each element of dense x, in the order of its memory, float64 and exact."""
    blocks = np.arange(-(-x.numel() // 4), dtype=np.uint64)
    words = random_words([blocks, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]).reshape(-1)[: x.numel()]
    u = torch.from_numpy((words >> np.uint64(8)).astype(np.float64) / 2**24)
    n, c, h, w = x.shape
    return u.view(n, c, h, w) if x.is_contiguous() else u.view(n, h, w, c).permute(0, 3, 1, 2)


def oracle(x, eps, seed, scale=1.0, clip=(0.0, 1.0)):
    """The definition in numpy: float32 (float64 for float64) throughout, rounded once at the end."""
    compute = compute_dtype(x.dtype)
    kind = np.float64 if compute == torch.float64 else np.float32
    natural, e = (t.cpu().to(compute).numpy() for t in (x, eps))
    u = uniform(x, seed).numpy().astype(kind)
    with np.errstate(invalid="ignore"):
        result = natural + (2 * u - kind(1)) * (kind(scale) * e)
        if clip is not None:
            low, high = (np.asarray(bound, dtype=kind).reshape(-1, 1, 1) for bound in clip)
            result = np.minimum(np.maximum(result, low), high)
    assert result.dtype == kind
    return torch.from_numpy(np.asarray(result)).to(x.device, x.dtype)


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_answers(counter, key, words):
    counter, key, words = map(words_of, (counter, key, words))
    assert [int(w) for w in philox(tuple(torch.tensor([c]) for c in counter), tuple(key))] == words
    assert random_words(counter, key).tolist() == words  # of the oracle below


def test_first_published_answer_is_the_noise_of_seed_0(backend):
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64, device=backend.device)
    result = uniform_start(x, 1.0, clip=None, seed=0).flatten().tolist()
    assert result == [2 * ((word >> 8) / 2**24) - 1 for word in words_of(PUBLISHED[0][2])]


@pytest.mark.thin(7)
@pairs
def test_matches_numpy_bit_for_bit(backend, dtype, layout, eps_form):
    for number, shape in enumerate(image_shapes(backend, dtype, layout, eps_form)):
        eps, dense = make_eps(eps_form, shape, backend.device)
        x = lay(torch.rand(shape, device=backend.device).to(dtype), layout)
        seed = SEEDS[number % len(SEEDS)]
        result = uniform_start(x, eps, seed=seed)
        assert_same(result, oracle(x, dense, seed), shape)
        assert_format(result, x)
        assert neighbours_untouched(x)


@pytest.mark.thin(3)
@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.25, 0.5), None, ([0.1, 0.2, 0.3], [0.6, 0.7, 0.8])], ids=str)
@pytest.mark.parametrize("scale", [0, 0.5, 2.0])
@dtypes
def test_scale_and_clip(backend, dtype, scale, clip):
    eps, dense = make_eps("(N,1,H,W)", (2, 3, 5, 7), backend.device)
    x = torch.rand(2, 3, 5, 7, device=backend.device).to(dtype)
    assert_same(uniform_start(x, eps, scale, clip, seed=9), oracle(x, dense, 9, scale, clip))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@dtypes
def test_nan_reaches_the_output(backend, dtype, layout):
    shape = (2, 3, 5, 7)
    eps = with_nan(make_eps("(N,1,H,W)", shape, backend.device)[0])
    x = lay(with_nan(torch.rand(shape, device=backend.device).to(dtype)), layout)
    result = uniform_start(x, eps, seed=3)
    assert torch.equal(result.isnan(), (x.isnan() | eps.isnan().expand(shape)))
    assert_same(result, oracle(x, eps.expand(shape), 3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("eps_form", ["float", "(N,1,H,W)", "PackedEpsilon M=1", "PackedEpsilon M=C"])
def test_many_threads(backend, layout, eps_form):
    # Past what one thread is given, and chunks that begin inside a block of four.
    shape = (1, 3, 8, 129) if backend.interpreted else (3, 3, 131, 127)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x = lay(torch.rand(shape, device=backend.device), layout)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert_same(uniform_start(x, eps, seed=8), oracle(x, dense, 8), eps_form)
    finally:
        torch.set_num_threads(before)


def test_noise_is_uniform_within_eps(backend):
    shape = (1, 1, 64, 65) if backend.interpreted else (16, 3, 64, 65)
    x = torch.full(shape, 0.5, dtype=torch.float64, device=backend.device)
    noise = ((uniform_start(x, 0.25, 2.0, seed=11) - x) / 0.5).flatten()
    assert noise.min() >= -1
    assert noise.max() < 1
    n = noise.numel()
    # Five standard deviations of a mean and of a mean square, and what Kolmogorov's test has one time in a million.
    assert abs(float(noise.mean())) < 5 * (1 / 3 / n) ** 0.5
    assert abs(float(noise.square().mean()) - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    steps = torch.arange(n, device=backend.device, dtype=torch.float64)
    assert ((noise.sort().values + 1) / 2 - (steps + 0.5) / n).abs().max() < 2.7 / n**0.5
    # Neighbours know nothing of each other: a correlation within five of its standard deviations.
    for lag in (1, 2, 4, 65):
        assert abs(float((noise[lag:] * noise[:-lag]).mean()) * 3) < 5 / n**0.5


def test_seeds_differ_and_repeat(backend):
    x = torch.rand(2, 3, 5, 7, device=backend.device)
    results = [uniform_start(x, EPS, seed=seed) for seed in SEEDS]
    for place, one in enumerate(results):
        assert torch.equal(one, uniform_start(x, EPS, seed=SEEDS[place]))
        assert all(not torch.equal(one, other) for other in results[:place])
    assert torch.equal(uniform_start(x[:1], EPS, seed=5), uniform_start(x, EPS, seed=5)[:1])


def test_a_new_tensor_without_derivative(backend):
    x = torch.rand(2, 3, 5, 7, device=backend.device, requires_grad=True)
    eps = torch.full((2, 1, 1, 1), EPS, device=backend.device, requires_grad=True)
    before = x.detach().clone()
    result = uniform_start(x, eps, seed=1)
    assert not result.requires_grad
    assert result.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)
    x, eps = x.detach(), eps.detach()
    assert not torch.func.grad(lambda t: uniform_start(t, eps, seed=1).sum())(x).any()
    assert not torch.func.jvp(lambda t: uniform_start(t, eps, seed=1), (x,), (x,))[1].any()


def test_vmap_gives_each_sample_what_its_own_call_gives(backend):
    x = torch.rand(3, 2, 3, 5, 7, device=backend.device)
    eps = torch.rand(3, 2, 1, 5, 7, device=backend.device)

    def start(t, e=EPS):
        return uniform_start(t, e, seed=4)

    expected = torch.stack([start(t, e) for t, e in zip(x, eps, strict=True)])
    assert_same(torch.vmap(start)(x, eps), expected)
    assert_same(torch.vmap(start, chunk_size=1)(x, eps), expected)
    assert_same(torch.vmap(start, in_dims=(2, 0))(x.movedim(0, 2), eps), expected)


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_images_are_copied(backend, kind):
    x = strided(kind, (2, 3, 5, 7), backend.device)
    eps, _ = make_eps("(N,1,H,W)", (2, 3, 5, 7), backend.device)
    result = uniform_start(x, eps, seed=6)
    last = kind == "crop of channels_last"
    dense = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert_same(result, uniform_start(dense, eps, seed=6))
    assert_format(result, dense)


def test_compiled_once_for_all_seeds():
    torch.compiler.reset()
    compiled = torch.compile(lambda t, seed: uniform_start(t, EPS, seed=seed) * 2, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 3, 5, 7)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for seed in (5, 6):  # the second seed makes it a number that may change
            assert_same(compiled(x, seed), uniform_start(x, EPS, seed=seed) * 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (7, 2**40):
            assert_same(compiled(x, seed), uniform_start(x, EPS, seed=seed) * 2)


@pytest.mark.parametrize(
    ("argument", "value", "error", "got"),
    [
        *[("x", *row) for row in BAD_IMAGES],
        *[("eps", *row) for row in BAD_EPS],
        ("scale", -1.0, ValueError, "-1.0"),
        ("scale", float("nan"), ValueError, "nan"),
        ("scale", torch.tensor(1.0), TypeError, "shape ()"),
        ("clip", (1.0, 0.0), ValueError, "(1.0, 0.0)"),
        ("clip", 1.0, TypeError, "1.0"),
        ("seed", -1, ValueError, "-1"),
        ("seed", 2**63, ValueError, str(2**63)),
        ("seed", 1.0, TypeError, "float"),
        ("seed", True, TypeError, "bool"),
        ("seed", torch.tensor(1), TypeError, "shape ()"),
    ],
)
def test_bad_input(backend, argument, value, error, got):
    arguments = {"x": torch.rand(2, 3, 4, 4, device=backend.device), "eps": EPS, "seed": 1}
    arguments[argument] = on_device(value, backend.device)
    assert_error(lambda: uniform_start(**arguments), argument, error, got)


def test_the_seed_must_be_said():
    with pytest.raises(TypeError, match="seed"):
        uniform_start(torch.rand(2, 3, 4, 4), EPS)  # type: ignore[call-arg]


def test_layouts_share_their_noise_in_memory(backend):
    """Word i belongs to element i in memory: to another pixel in channels_last."""
    for layout in LAYOUTS:
        x = lay(torch.zeros(2, 3, 5, 7, device=backend.device), layout)
        noise: Tensor = uniform_start(x, 1.0, clip=None, seed=2)
        in_memory = noise.permute(0, 2, 3, 1) if layout.endswith("channels_last") else noise
        assert_same(in_memory.flatten().double().cpu(), 2 * uniform(torch.zeros(1, 1, 1, 210), 2).flatten() - 1)
