"""tools/ptx_cpu itself: planted faults that it catches, and instructions against values worked out by hand.

The values follow the PTX ISA's definitions of the instructions.
"""

import functools
import shutil
import struct

import pytest
import torch
from tools.ptx_cpu import Kernel, PtxError
from tools.ptx_cpu.kernel import check_launch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@functools.cache
def kernel(body: str, parameters: str = ".param .u64 out", variables: str = "") -> Kernel:
    text = f"""
        .version 8.8
        .target sm_90
        .address_size 64
        {variables}
        .visible .entry one({parameters})
        {{
            .reg .pred %p<9>;
            .reg .b16 %h<9>;
            .reg .b32 %r<40>;
            .reg .b64 %d<20>;
            {body}
            ret;
        }}"""
    return Kernel(text, "one", opt="-O0")


def one_of(alternatives: tuple[str, ...], before: str = "", after: str = "") -> Kernel:
    """A kernel whose second argument says which of the alternatives it runs: one compilation for all of them."""
    parts = [f"setp.ne.s32 %p8, %r39, {k}; @%p8 bra NEXT{k}; {text} NEXT{k}:" for k, text in enumerate(alternatives)]
    body = "\n".join([before, "ld.param.u32 %r39, [which];", *parts, after])
    return kernel(body, ".param .u64 out, .param .u32 which")


# out[i] = in[i], the addresses shifted by as many bytes as the launch says.
COPY = """
    ld.param.u64 %d1, [in];
    ld.param.u64 %d2, [out];
    ld.param.s32 %d3, [shift_in];
    ld.param.s32 %d4, [shift_out];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %d5, %r1, 4, %d1;
    mad.wide.u32 %d6, %r1, 4, %d2;
    add.s64 %d5, %d5, %d3;
    add.s64 %d6, %d6, %d4;
    ld.global.f32 %r2, [%d5];
    st.global.f32 [%d6], %r2;
"""
COPIED = ".param .u64 in, .param .u64 out, .param .u32 shift_in, .param .u32 shift_out"


def copy(*shifts: int, n: int = 40, **options) -> tuple[torch.Tensor, torch.Tensor, dict | None]:
    source, target = torch.rand(n), torch.full((n,), float("nan"))
    report = kernel(COPY, COPIED)(1, n, [source, target, *shifts], **options)
    return source, target, report


def test_a_kernel_without_a_fault():
    source, target, _ = copy(0, 0)
    assert torch.equal(target, source)


@pytest.mark.parametrize(
    ("shifts", "message"),
    [
        ((4, 0), "global read out of bounds .* thread=39 instr: ld.global.f32"),
        ((-4, 0), "global read out of bounds .* thread=0 instr: ld.global.f32"),
        ((0, 4), "global write out of bounds .* thread=39 instr: st.global.f32"),
        ((0, -160), "global write out of bounds .* thread=0 instr: st.global.f32"),
        ((2, 0), "misaligned access .* instr: ld.global.f32"),
        ((0, 1), "misaligned access .* instr: st.global.f32"),
    ],
)
def test_a_wrong_address_is_caught(shifts, message):
    with pytest.raises(PtxError, match=message):
        copy(*shifts)


def test_addresses_at_the_end_of_the_address_space_are_out_of_bounds():
    """Where address + size is 0."""
    with pytest.raises(PtxError, match="global read out of bounds addr=0xfffffffffffffffc"):
        kernel("mov.b64 %d1, 0; ld.global.b32 %r1, [%d1 + -4];")(1, 1, [torch.zeros(4)])


def test_a_wrong_result_shows():
    """What is compared with a reference is what the PTX computes, not what the kernel was meant to compute."""
    body = "ld.param.u64 %d1, [out]; ld.global.b32 %r1, [%d1]; {} %r1, %r1, 3; st.global.b32 [%d1], %r1;"
    results = {}
    for instruction in ("add.s32", "sub.s32"):
        out = torch.tensor([4], dtype=torch.int32)
        kernel(body.format(instruction))(1, 1, [out])
        results[instruction] = out.item()
    assert results == {"add.s32": 7, "sub.s32": 1}


def test_what_is_not_written_is_not_a_number():
    out = torch.zeros(1)
    store = kernel("ld.param.u64 %d1, [out]; st.global.b32 [%d1], %r1;")
    store(1, 1, [out])
    assert out.isnan()
    store(1, 1, [out], fill=0)
    assert out == 0


WRONG_ADDRESSES = {
    "ld.shared.b32 %r1, [%r9];": "shared access out of bounds",
    "st.shared.b32 [%r9], %r1;": "shared access out of bounds",
    "ld.local.b32 %r1, [%r9];": "local access out of bounds",
    "ld.param.b32 %r1, [%r9];": "parameter access out of bounds",
    "ld.shared.b32 %r1, [room + 6];": "misaligned access",
    "atom.shared.add.u32 %r1, [room + 14], 1;": "misaligned access",
    # Rows of matrices: 16 bytes each, at multiples of 16, 8 of them here.
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r8 + 8], {%r4};": "misaligned access",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r8 + 16], {%r4};": "shared access out of bounds",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r8 + 16];": "shared access out of bounds",
}


@pytest.mark.parametrize("instruction", WRONG_ADDRESSES)
def test_the_other_spaces_are_checked_as_well(instruction):
    before = """
        .shared .align 16 .b8 room[128];
        .local .align 4 .b8 own[128];
        mov.b32 %r9, 128;
        mov.u32 %r1, %laneid;
        mov.u32 %r2, room;
        mad.lo.s32 %r8, %r1, 16, %r2;"""
    wrong = one_of(tuple(WRONG_ADDRESSES), before)
    with pytest.raises(PtxError, match=WRONG_ADDRESSES[instruction]):
        wrong(1, 32, [None, list(WRONG_ADDRESSES).index(instruction)])


# 64 threads: each writes its number to shared memory, and reads that of the other warp, with a barrier between or not.
EXCHANGE = """
    .shared .align 16 .b8 room[256];
    ld.param.u64 %d1, [out];
    ld.param.u32 %r1, [barrier];
    setp.ne.s32 %p1, %r1, 0;
    mov.u32 %r2, %tid.x;
    shl.b32 %r3, %r2, 2;
    xor.b32 %r4, %r3, 128;
    mov.u32 %r5, room;
    add.s32 %r6, %r5, %r3;
    add.s32 %r7, %r5, %r4;
    st.shared.b32 [%r6], %r2;
    @%p1 bar.sync 0;
    ld.shared.b32 %r8, [%r7];
    mad.wide.u32 %d2, %r2, 4, %d1;
    st.global.b32 [%d2], %r8;
"""


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_missing_barrier_is_a_race(seed):
    exchange, out = kernel(EXCHANGE, ".param .u64 out, .param .u32 barrier"), torch.zeros(64, dtype=torch.int32)
    exchange(1, 64, [out, 1], race=True, seed=seed)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 32)
    with pytest.raises(PtxError, match="shared-memory race"):
        exchange(1, 64, [out, 0], race=True, seed=seed)


# What one warp does and what the other does, with no barrier between: whether it is a race.
BOTH = {
    ("atom.shared.add.u32 %r1, [room], 1;", "atom.shared.add.u32 %r1, [room], 1;"): False,
    ("ld.shared.b32 %r1, [room];", "ld.shared.b32 %r1, [room];"): False,
    ("st.shared.b32 [room], 1;", "st.shared.b32 [room + 4], 1;"): False,
    ("st.shared.b32 [room], 1;", "st.shared.b8 [room + 3], 1;"): True,
    ("st.shared.b32 [room], 1;", "atom.shared.add.u32 %r1, [room], 1;"): True,
    ("ld.shared.b32 %r1, [room];", "atom.shared.add.u32 %r1, [room], 1;"): True,
    (
        "st.shared.b32 [room], 1; @%p1 atom.shared.add.u32 %r1, [room], 1;",
        "atom.shared.add.u32 %r1, [room], 1;",
    ): True,
}


@pytest.mark.parametrize("pair", BOTH)
def test_which_accesses_of_two_warps_are_a_race(pair):
    """Whichever of them comes first."""
    before = ".shared .align 16 .b8 room[16]; mov.u32 %r2, %tid.x; setp.lt.u32 %p1, %r2, 32;"
    both = one_of(tuple(f"@%p1 {first} @!%p1 {second}" for first, second in BOTH), before)
    for seed in range(4):
        found = None
        try:
            both(1, 64, [None, list(BOTH).index(pair)], race=True, seed=seed)
        except PtxError as error:
            found = str(error)
        assert (found is not None) == BOTH[pair], (seed, found)
        assert found is None or found.startswith("shared-memory race")


ENDS = {
    "@%p1 bar.sync 1, 64;": "deadlock",
    "@%p1 bra DONE; shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1; DONE: bar.warp.sync -1;": "lanes .* never arrive",
    "AGAIN: @%p1 bra AGAIN;": "step limit reached",
    "trap;": "trap",
}


@pytest.mark.parametrize("instruction", ENDS)
def test_kernels_that_do_not_end_well(instruction):
    bad = one_of(tuple(ENDS), "mov.u32 %r2, %tid.x; setp.lt.u32 %p1, %r2, 8;")
    with pytest.raises(PtxError, match=ENDS[instruction]):
        bad(1, 64, [None, list(ENDS).index(instruction)], max_steps=1000)


def test_an_instruction_that_is_not_known_raises_when_it_is_reached():
    """An opcode that is not known, and a modifier that would change the result."""
    instructions = ("tex.2d.v4.f32.f32 {%r1, %r2, %r3, %r4}, [t, {%r5}];", "add.rz.f32 %r1, %r1, %r1;")
    unknown = one_of(tuple(f"@%p1 {text}" for text in instructions), "mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r2, 5;")
    assert len(unknown.unsupported) == 2
    for which in (0, 1):
        unknown(1, 5, [None, which])
        with pytest.raises(PtxError, match=r"unsupported instruction .* thread=5"):
            unknown(1, 6, [None, which])


def test_a_launch_that_a_gpu_would_refuse():
    bad = [
        (".reqntid 64", (32, 1, 1), 0, r"^the kernel was compiled for .reqntid \(64, 1, 1\), got a block of \(32,"),
        (
            ".maxntid 64, 1, 1",
            (96, 1, 1),
            0,
            r"^the kernel was compiled for .maxntid \(64, 1, 1\), got a block of \(96,",
        ),
        ("", (64, 32, 1), 0, "^a block has at most 1024 threads, got 2048$"),
        ("", (32, 1, 1), 232449, "^a block has at most 232448 bytes of shared memory, got 232449$"),
    ]
    for head, block, shared_bytes, message in bad:
        with pytest.raises(PtxError, match=message):
            check_launch(head, block, shared_bytes)
    check_launch(".maxntid 64, 1, 1", (64, 1, 1), 232448)


def test_arguments_that_do_not_fit():
    parameters = ".param .u64 out, .param .f32 scale, .param .align 8 .b8 rest[24]"
    whole = kernel("", parameters)
    whole(1, 1, [None, 1.5, bytes(24)])
    bad = ([None], [None, 1, bytes(24)], [None, 1.5, bytes(16)], [None, "1", bytes(24)], [1.5, 1.5, bytes(24)])
    for arguments in (*bad, [None, 1.5, bytes(24), None]):
        with pytest.raises(ValueError, match=r"^(arguments|out|scale|rest) must "):
            whole(1, 1, arguments)
    with pytest.raises(ValueError, match=r"^name must be that of one kernel, got 'two' of one$"):
        Kernel(".visible .entry one() { ret; }", "two")
    with pytest.raises(ValueError, match=r"^blocks must be numbers below 4, got 4$"):
        kernel("")(4, 1, [None], blocks=[4])


def test_what_is_counted():
    """A warp that reads neighbouring words moves 4 sectors of 32 bytes; words 32 bytes apart take one each."""
    _, _, report = copy(0, 0, n=64, stats=True)
    assert [(m["instr"].split()[0], m["warp_requests"], m["bytes"]) for m in report["mem"]] == [
        ("ld.global.f32", 2, 256), ("st.global.f32", 2, 256),
    ]  # fmt: skip
    body = COPY.replace("%r1, 4", "%r1, 32")
    wide = torch.empty(8 * 32)
    report = kernel(body, COPIED)(1, 32, [wide, wide.clone(), 0, 0], stats=True)
    assert [(m["sectors_per_request"], m["sector_efficiency"]) for m in report["mem"]] == [(32, 1 / 8)] * 2
    assert [(f["read_bytes"], f["written_bytes"]) for f in report["footprint"]] == [(1024, 0), (0, 1024)]


def test_bank_conflicts():
    """Words 4 bytes apart lie in 32 banks, 128 apart in one; a word that all read takes one cycle."""
    body = """
        .shared .align 16 .b8 room[4096];
        ld.param.u32 %r5, [apart];
        mov.u32 %r1, %tid.x;
        mul.lo.s32 %r2, %r1, %r5;
        mov.u32 %r3, room;
        add.s32 %r2, %r2, %r3;
        ld.shared.b32 %r4, [%r2];
        atom.shared.add.u32 %r4, [%r2], 1;"""
    for apart, extra in ((4, 0), (8, 1), (128, 31), (0, 0)):
        report = kernel(body, ".param .u64 out, .param .u32 apart")(1, 32, [None, apart], stats=True)
        assert (report["shared_requests"], report["shared_bank_conflict_extra"]) == (1, extra)
        assert (report["shared_atomics"], report["shared_atomic_conflict_extra"]) == (1, extra)


def bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


NAN, ONE, ZERO, MINUS_ZERO = "0f7FC00000", "0f3F800000", "0f00000000", "0f80000000"
# Instructions that leave a result in %r1, and its bits.
VALUES = [
    # A carry does not leave its half; nothing saturates.
    ("add.s16x2 %r1, {a}, {b};", (0x0001FFFF, 0x00010001), 0x00020000),
    ("add.s16x2 %r1, {a}, {b};", (0x7FFF8000, 0x0001FFFF), 0x80007FFF),
    ("add.u16x2 %r1, {a}, {b};", (0xFFFF0001, 0x00020003), 0x00010004),
    ("min.s16x2 %r1, {a}, {b};", (0x8000FFFF, 0x00017FFF), 0x8000FFFF),
    ("max.u16x2 %r1, {a}, {b};", (0x8000FFFF, 0x00017FFF), 0x8000FFFF),
    ("max.s16x2 %r1, {a}, {b};", (0x8000FFFF, 0x00017FFF), 0x00017FFF),
    # 1.0 and 2.0 in bfloat16: 3f80, 4000; in float16: 3c00, 4000.
    ("add.bf16x2 %r1, {a}, {b};", (0x3F804000, 0x3F803F80), 0x40004040),
    ("fma.rn.f16x2 %r1, {a}, {b}, {a};", (0x3C004000, 0x40004000), 0x42004600),
    ("neg.bf16x2 %r1, {a};", (0x3F80BF80, 0), 0xBF803F80),
    ("abs.f16x2 %r1, {a};", (0x3C00BC00, 0), 0x3C003C00),
    ("min.NaN.bf16x2 %r1, {a}, {b};", (0x7FC03F80, 0x3F804000), 0x7FFF3F80),
    ("min.bf16x2 %r1, {a}, {b};", (0x7FC03F80, 0x3F804000), 0x3F803F80),
    # Half of a unit rounds to even: 3f80.8 down, 3f81.8 up.
    (f"cvt.rn.bf16x2.f32 %r1, 0f{0x3F808000:08X}, 0f{0x3F818000:08X};", (0, 0), 0x3F803F82),
    (f"cvt.rn.f16x2.f32 %r1, 0f{bits(65520.0):08X}, {NAN};", (0, 0), 0x7C007FFF),
    # 1.0625 squared and 2^-30: 1.125 + 2^-8 + 2^-30, above half a unit of bfloat16; float32 loses the last term.
    ("fma.rn.bf16x2 %r1, {a}, {a}, {b};", (0x3F883F88, 0x30803080), 0x3F913F91),
    # 1 + 2^-24: half a unit again.
    ("cvt.rn.f32.f64 %r1, 0d3FF0000010000000;", (0, 0), 0x3F800000),
    ("cvt.rni.s32.f32 %r1, 0f40200000;", (0, 0), 2),
    ("cvt.rzi.s32.f32 %r1, 0fBFC00000;", (0, 0), 0xFFFFFFFF),
    ("cvt.rmi.s32.f32 %r1, 0fBFC00000;", (0, 0), 0xFFFFFFFE),
    ("cvt.rpi.s32.f32 %r1, 0f3FA00000;", (0, 0), 2),
    ("cvt.rzi.s32.f32 %r1, 0f4F800000;", (0, 0), 0x7FFFFFFF),
    (f"cvt.rzi.s32.f32 %r1, {NAN};", (0, 0), 0),
    ("cvt.u16.u32 %h1, {a}; cvt.s32.s16 %r1, %h1;", (0x12348001, 0), 0xFFFF8001),
    ("cvt.sat.u8.s32 %r1, {a};", (0x180, 0), 0xFF),
    ("cvt.rn.f32.s32 %r1, {a};", (0xFFFFFFFF, 0), bits(-1.0)),
    (f"min.f32 %r1, {NAN}, {ONE};", (0, 0), bits(1.0)),
    (f"min.NaN.f32 %r1, {NAN}, {ONE};", (0, 0), 0x7FFFFFFF),
    (f"min.f32 %r1, {ZERO}, {MINUS_ZERO};", (0, 0), 0x80000000),
    (f"max.f32 %r1, {MINUS_ZERO}, {ZERO};", (0, 0), 0),
    (f"add.sat.f32 %r1, {ONE}, {ONE};", (0, 0), bits(1.0)),
    ("mul.ftz.f32 %r1, 0f00800000, 0f3F000000;", (0, 0), 0),
    ("mul.f32 %r1, 0f00800000, 0f3F000000;", (0, 0), 0x00400000),
    # (1 + 2^-12)^2 - 1 = 2^-11 + 2^-24, whose last term a rounded product loses.
    ("fma.rn.f32 %r1, 0f3F800800, 0f3F800800, 0fBF800000;", (0, 0), bits(2**-11 + 2**-24)),
    ("mul.rn.f32 %r1, 0f3F800800, 0f3F800800; sub.rn.f32 %r1, %r1, 0f3F800000;", (0, 0), bits(2**-11)),
    ("div.rn.f32 %r1, 0f3F800000, 0f40400000;", (0, 0), 0x3EAAAAAB),
    ("sqrt.rn.f32 %r1, 0f40800000;", (0, 0), bits(2.0)),
    ("ex2.approx.f32 %r1, 0f40400000;", (0, 0), bits(8.0)),
    ("mul.hi.u32 %r1, {a}, {b};", (0x80000000, 6), 3),
    ("mul.hi.s32 %r1, {a}, {b};", (0x80000000, 6), 0xFFFFFFFD),
    ("mul.lo.s32 %r1, {a}, {b};", (0xFFFFFFFF, 7), 0xFFFFFFF9),
    ("mul.wide.s32 %d9, {a}, {b}; shr.u64 %d9, %d9, 32; cvt.u32.u64 %r1, %d9;", (0xFFFFFFFF, 7), 0xFFFFFFFF),
    ("mad.lo.s32 %r1, {a}, {b}, {b};", (5, 7), 42),
    ("div.s32 %r1, {a}, {b};", (0xFFFFFFF9, 2), 0xFFFFFFFD),
    ("rem.s32 %r1, {a}, {b};", (0xFFFFFFF9, 2), 0xFFFFFFFF),
    ("div.s32 %r1, {a}, {b};", (0x80000000, 0xFFFFFFFF), 0x80000000),
    ("add.sat.s32 %r1, {a}, {b};", (0x7FFFFFFF, 1), 0x7FFFFFFF),
    ("abs.s32 %r1, {a};", (0xFFFFFFFB, 0), 5),
    ("neg.s32 %r1, {a};", (5, 0), 0xFFFFFFFB),
    ("shl.b32 %r1, {a}, {b};", (1, 31), 0x80000000),
    ("shl.b32 %r1, {a}, {b};", (1, 32), 0),
    ("shr.u32 %r1, {a}, {b};", (0x80000000, 40), 0),
    ("shr.s32 %r1, {a}, {b};", (0x80000000, 40), 0xFFFFFFFF),
    ("shf.l.wrap.b32 %r1, {a}, {b}, 8;", (0x12345678, 0x9ABCDEF0), 0xBCDEF012),
    ("shf.r.clamp.b32 %r1, {a}, {b}, 40;", (0x12345678, 0x9ABCDEF0), 0x9ABCDEF0),
    ("lop3.b32 %r1, {a}, {b}, 0x0F0F0F0F, 0x96;", (0x00FF00FF, 0x0000FFFF), 0x0FF0F00F),
    ("prmt.b32 %r1, {a}, {b}, 0x7450;", (0x44332211, 0x88776655), 0x88556611),
    ("prmt.b32 %r1, {a}, {b}, 0x8F01;", (0x44332211, 0x88776655), 0x00FF1122),
    ("bfe.u32 %r1, {a}, 8, 12;", (0x12345678, 0), 0x456),
    ("bfe.s32 %r1, {a}, 4, 4;", (0x80, 0), 0xFFFFFFF8),
    ("bfi.b32 %r1, {a}, {b}, 8, 4;", (0xF5, 0xFFFFFFFF), 0xFFFFF5FF),
    ("brev.b32 %r1, {a};", (0x00000005, 0), 0xA0000000),
    ("popc.b32 %r1, {a};", (0xF0F00001, 0), 9),
    ("clz.b32 %r1, {a};", (0x00010000, 0), 15),
    ("clz.b32 %r1, {a};", (0, 0), 32),
    ("bfind.u32 %r1, {a};", (0x00010000, 0), 16),
    ("bfind.s32 %r1, {a};", (0xFFFFFF7F, 0), 7),
    ("mov.b32 {{%h1, %h2}}, {a}; mov.b32 %r1, {{%h2, %h1}};", (0x12345678, 0), 0x56781234),
    ("mov.b64 %d9, {{{a}, {b}}}; mov.b64 {{%r3, %r1}}, %d9;", (1, 2), 2),
    ("vote.sync.ballot.b32 %r1, 1, 0xffffffff;", (0, 0), 0xFFFFFFFF),
    ("redux.sync.add.s32 %r1, {a}, 0xffffffff;", (3, 0), 96),
    ("redux.sync.max.s32 %r1, {a}, 0xffffffff;", (0xFFFFFFFE, 0), 0xFFFFFFFE),
]


def test_values():
    """All of them in one kernel, the operands in registers."""
    lines, count = ["ld.param.u64 %d1, [out];"], len(VALUES)
    for place, (text, (a, b), _) in enumerate(VALUES):
        lines += [f"mov.b32 %r20, {a};", f"mov.b32 %r21, {b};", text.format(a="%r20", b="%r21")]
        lines.append(f"st.global.b32 [%d1 + {4 * place}], %r1;")
    out = torch.zeros(count, dtype=torch.int64).to(torch.int32)
    every = kernel("\n".join(lines))
    assert every.unsupported == []
    every(1, 32, [out])
    for (text, operands, expected), got in zip(VALUES, out.tolist(), strict=True):
        assert got % 2**32 == expected, (text, [hex(o) for o in operands], hex(got % 2**32), hex(expected))


# bfloat16: 1.0 is 3f80, 2.0 is 4000, NaN 7fc0. The low half is the first predicate, the high half the second.
PAIRS = [
    ("setp.lt.bf16x2 %p1|%p2, {a}, {b};", 0x3F804000, 0x40003F80, (False, True)),
    ("setp.gt.bf16x2 %p1|%p2, {a}, {b};", 0x3F804000, 0x40003F80, (True, False)),
    ("setp.eq.bf16x2 %p1|%p2, {a}, {b};", 0x3F804000, 0x3F804000, (True, True)),
    ("setp.eq.bf16x2 %p1|%p2, {a}, {b};", 0x00008000, 0x80008000, (True, True)),  # 0 and -0
    ("setp.ne.bf16x2 %p1|%p2, {a}, {b};", 0x7FC04000, 0x40003F80, (True, False)),
    ("setp.neu.bf16x2 %p1|%p2, {a}, {b};", 0x7FC04000, 0x40004000, (False, True)),
    ("setp.nan.bf16x2 %p1|%p2, {a}, {b};", 0x7FC04000, 0x40003F80, (False, True)),
    ("setp.le.and.bf16x2 %p1|%p2, {a}, {b}, %p3;", 0x3F803F80, 0x3F804000, (True, True)),
    ("setp.le.and.bf16x2 %p1|%p2, {a}, {b}, !%p3;", 0x3F803F80, 0x3F804000, (False, False)),
    ("setp.gt.or.bf16x2 %p1|%p2, {a}, {b}, !%p3;", 0x40003F80, 0x3F804000, (False, True)),
    ("setp.gt.xor.bf16x2 %p1|%p2, {a}, {b}, %p3;", 0x40003F80, 0x3F804000, (True, False)),
    ("setp.lt.f16x2 %p1|%p2, {a}, {b};", 0x3C004000, 0x40003C00, (False, True)),
    # Of one comparison the second predicate is the opposite, combined with the same third.
    ("setp.lt.s32 %p1|%p2, {a}, {b};", 0xFFFFFFFF, 0, (True, False)),
    ("setp.lo.u32 %p1|%p2, {a}, {b};", 0xFFFFFFFF, 0, (False, True)),
    ("setp.lt.and.s32 %p1|%p2, {a}, {b}, !%p3;", 0xFFFFFFFF, 0, (False, False)),
    ("setp.ne.f32 %p1|%p2, {a}, {b};", 0x7FC00000, 0, (False, True)),
    ("setp.neu.f32 %p1|%p2, {a}, {b};", 0x7FC00000, 0, (True, False)),
]


def test_pairs_of_predicates():
    lines = ["ld.param.u64 %d1, [out]; setp.eq.s32 %p3, 0, 0;"]
    for place, (text, a, b, _) in enumerate(PAIRS):
        lines += [f"mov.b32 %r20, {a};", f"mov.b32 %r21, {b};", text.format(a="%r20", b="%r21")]
        lines += ["selp.b32 %r1, 1, 0, %p1;", "selp.b32 %r2, 1, 0, %p2;"]
        lines.append(f"st.global.v2.b32 [%d1 + {8 * place}], {{%r1, %r2}};")
    out = torch.full((len(PAIRS), 2), -1, dtype=torch.int32)
    every = kernel("\n".join(lines))
    assert every.unsupported == []
    every(1, 1, [out])
    for row, got in zip(PAIRS, out.bool().tolist(), strict=True):
        assert tuple(got) == row[3], row


def matrices(instruction: str, count: int) -> torch.Tensor:
    """(count, 8, 8) 16-bit elements in shared memory, after each lane's register k holds 2 elements that are its own:
    64 k + 2 lane, and the next."""
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    body = f"""
        .shared .align 16 .b8 room[{128 * count}];
        ld.param.u64 %d1, [out];
        mov.u32 %r1, %laneid;
        mov.u32 %r2, room;
        mad.lo.s32 %r3, %r1, 16, %r2;
        {"".join(f"mad.lo.s32 %r{10 + k}, %r1, 0x20002, {0x10000 + 0x400040 * k};" for k in range(count))}
        {instruction} [%r3], {{{registers}}};
        bar.warp.sync -1;
        setp.ge.u32 %p1, %r1, {8 * count};
        @%p1 bra DONE;
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
        mad.wide.u32 %d2, %r1, 16, %d1;
        st.global.v4.b32 [%d2], {{%r4, %r5, %r6, %r7}};
        DONE:"""
    out = torch.full((count, 8, 8), -1, dtype=torch.int16)
    kernel(body)(1, 32, [out], race=True)
    return out


@pytest.mark.parametrize("count", [1, 4])
def test_stmatrix(count):
    """Lane 4 r + c holds elements 2 c and 2 c + 1 of row r, so in order of rows the elements are 0, 1, 2 and so on."""
    elements = torch.arange(64 * count, dtype=torch.int16).view(count, 8, 8)
    stored = matrices(f"stmatrix.sync.aligned.m8n8.x{count}.shared.b16", count)
    assert torch.equal(stored, elements)
    assert stored[0, 1].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    stored = matrices(f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16", count)
    assert torch.equal(stored, elements.mT)
    assert stored[0, 1].tolist() == [1, 9, 17, 25, 33, 41, 49, 57]


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    """What lane 4 r + c gets: elements 2 c and 2 c + 1 of row r, or of column r."""
    trans = ".trans" if transposed else ""
    body = f"""
        .shared .align 16 .b8 room[256];
        ld.param.u64 %d1, [in];
        ld.param.u64 %d2, [out];
        mov.u32 %r1, %laneid;
        mov.u32 %r2, room;
        mad.wide.u32 %d3, %r1, 8, %d1;
        mad.lo.s32 %r3, %r1, 8, %r2;
        ld.global.v2.b32 {{%r4, %r5}}, [%d3];
        st.shared.v2.b32 [%r3], {{%r4, %r5}};
        bar.warp.sync -1;
        mad.lo.s32 %r3, %r1, 16, %r2;
        ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r6, %r7}}, [%r3];
        mad.wide.u32 %d4, %r1, 4, %d2;
        st.global.b32 [%d4], %r6;
        st.global.b32 [%d4 + 128], %r7;"""
    elements, out = torch.arange(128, dtype=torch.int16).view(2, 8, 8), torch.zeros(2, 8, 4, 2, dtype=torch.int16)
    kernel(body, ".param .u64 in, .param .u64 out")(1, 32, [elements, out])
    assert torch.equal(out.view(2, 8, 8), elements.mT if transposed else elements)


SHUFFLES = {
    "up.b32 %r2, %r1, 3, 0": lambda lane: lane - 3 if lane >= 3 else lane,
    "down.b32 %r2, %r1, 3, 31": lambda lane: lane + 3 if lane < 29 else lane,
    "bfly.b32 %r2, %r1, 5, 31": lambda lane: lane ^ 5,
    "idx.b32 %r2, %r1, 2, 0x181f": lambda lane: lane // 8 * 8 + 2,  # segments of 8 lanes
}


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffles(mode):
    before = "ld.param.u64 %d1, [out]; mov.u32 %r1, %laneid; mad.wide.u32 %d2, %r1, 4, %d1;"
    shuffles = tuple(f"shfl.sync.{text}, 0xffffffff;" for text in SHUFFLES)
    out = torch.zeros(32, dtype=torch.int32)
    one_of(shuffles, before, "st.global.b32 [%d2], %r2;")(1, 32, [out, list(SHUFFLES).index(mode)])
    assert out.tolist() == [SHUFFLES[mode](lane) for lane in range(32)]


def test_blocks_and_threads_have_their_numbers():
    body = """
        ld.param.u64 %d1, [out];
        mov.u32 %r1, %ctaid.y;
        mov.u32 %r2, %nctaid.x;
        mov.u32 %r3, %ctaid.x;
        mad.lo.s32 %r1, %r1, %r2, %r3;
        mov.u32 %r2, %ntid.y;
        mov.u32 %r3, %tid.y;
        mad.lo.s32 %r1, %r1, %r2, %r3;
        mov.u32 %r2, %ntid.x;
        mov.u32 %r3, %tid.x;
        mad.lo.s32 %r1, %r1, %r2, %r3;
        mad.wide.u32 %d2, %r1, 4, %d1;
        st.global.b32 [%d2], %r1;"""
    out = torch.full((2 * 3 * 35,), -1, dtype=torch.int32)
    for seed in (0, 5):
        kernel(body)((3, 2), (7, 5), [out.fill_(-1)], seed=seed)
        assert torch.equal(out, torch.arange(210, dtype=torch.int32))
    kernel(body)((3, 2), (7, 5), [out.fill_(-1)], blocks=[1, 5])
    assert (out >= 0).nonzero().flatten().tolist() == [*range(35, 70), *range(175, 210)]


def test_variables_of_the_module():
    variables = """
        .const .align 8 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3};
        .global .align 4 .u32 number = 40;
        .extern .shared .align 16 .b8 room[];"""
    body = """
        ld.param.u64 %d1, [out];
        ld.const.b32 %r1, [table + 4];
        ld.global.b32 %r2, [number];
        add.s32 %r1, %r1, %r2;
        mov.u32 %r3, room;
        st.shared.b32 [%r3 + 4], %r1;
        ld.shared.b32 %r4, [room + 4];
        st.global.b32 [%d1], %r4;"""
    out = torch.zeros(1, dtype=torch.int32)
    kernel(body, variables=variables)(1, 1, [out], 8)
    assert out == 42
    with pytest.raises(PtxError, match="shared access out of bounds"):
        kernel(body, variables=variables)(1, 1, [out], 4)
