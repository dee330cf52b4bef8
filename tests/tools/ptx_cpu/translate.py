"""Translates a kernel's PTX to C++ for runtime.h and scheduler.h.

Every instruction becomes C++ that runs it for the lanes of a mask `m` of one warp `w` of a block `b`; what is written
`LANES(m) { ... }` runs once for each, `l` being the lane. Registers are arrays over lanes, predicates masks.
"""

import dataclasses
import functools
import re

from .parse import TYPES, Entry, Module, UnsupportedError, parse_variables, round_up, split, statements

COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
ROUNDINGS = {"rni": "NEAREST", "rzi": "ZERO", "rmi": "DOWN", "rpi": "UP"}
LOGICAL = {"and": "&", "or": "|", "xor": "^"}
SPACES = {
    "global": "GLOBAL", "shared": "SHARED", "shared__cta": "SHARED", "local": "LOCAL", "param": "PARAMETER",
    "const": "GLOBAL",
}  # fmt: skip
SPECIAL = {
    "%laneid": "l",
    "%warpid": "w.index",
    "%nwarpid": "(b.threads + 31) / 32",
    "%lanemask_eq": "1u << l",
    "%lanemask_lt": "(1u << l) - 1",
    "%lanemask_le": "(2u << l) - 1",
    "%lanemask_gt": "~((2u << l) - 1)",
    "%lanemask_ge": "~((1u << l) - 1)",
    **{f"%tid.{axis}": f"w.thread[{i}][l]" for i, axis in enumerate("xyz")},
    **{f"%ntid.{axis}": f"b.launch->block[{i}]" for i, axis in enumerate("xyz")},
    **{f"%ctaid.{axis}": f"b.index[{i}]" for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": f"b.launch->grid[{i}]" for i, axis in enumerate("xyz")},
}
# An instruction with any other is not run: it would give another result.
MODIFIERS = {
    *TYPES, *COMPARISONS, *UNORDERED, *ROUNDINGS, *LOGICAL, *SPACES, "num", "nan", "rn", "approx", "full", "ftz", "sat",
    "NaN", "lo", "hi", "wide", "to", "uni", "sync", "aligned", "warp", "v2", "v4", "v8", "up", "down", "bfly", "idx",
    "all", "any", "ballot", "add", "min", "max", "exch", "cas", "inc", "dec", "m8n8", "x1", "x2", "x4", "trans", "wrap",
    "clamp", "l", "r",
    # Of memory's order and of caches, which do not change what one thread after another reads.
    "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc", "cta", "gpu", "sys", "nc", "ca", "cg", "cs",
    "lu", "cv", "wb", "wt", "L2",
}  # fmt: skip
CACHE_HINT = re.compile(r"L1__(no_allocate|evict_\w+)|L2__\d+B")
# They order the accesses of threads, which run one after another here.
FENCES = ("membar", "fence")
TRANSFERS = ("bra", "ret", "exit")
COLLECTIVES = ("shfl", "vote", "redux", "ldmatrix", "stmatrix")


@dataclasses.dataclass(frozen=True)
class Register:
    """A register's name in the C++; `count` of them where PTX declares a family such as %r<8>."""

    c: str
    bits: int
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Address:
    """A variable's address as C++, and the space it lies in."""

    c: str
    space: str


@dataclasses.dataclass
class Code:
    """A basic block: C++ lines, labels that it has, and whether its last line is a transfer of control.

    `members` is C++ for the lanes that its first instruction takes together, that instruction's mask, and its number.
    """

    lines: list[str] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)
    transfers: bool = False
    members: tuple[str, str, int] | None = None


class Instruction:
    def __init__(self, text: str, number: int):
        self.text, self.number = re.sub(r"\s+", " ", text), number
        guard, opcode, operands = re.match(r"(?:@(!?[\w%$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL).groups()
        self.guard = guard
        self.base, *self.parts = opcode.replace("::", "__").split(".")
        self.flags = set(self.parts)
        self.operands = split(operands)
        self.types = [part for part in self.parts if part in TYPES]

    @property
    def type(self) -> str:
        if not self.types:
            raise UnsupportedError(f"no type that is known in {self.text!r}")
        return self.types[-1]

    def one_of(self, choices) -> str:
        for part in self.parts:
            if part in choices:
                return part
        raise UnsupportedError(f"none of {', '.join(choices)} in {self.text!r}")

    def width(self) -> int:
        """Of a vector; 1 without one."""
        return int(next((part[1:] for part in self.parts if part in ("v2", "v4", "v8")), 1))

    def refuse(self, *parts: str) -> None:
        if found := self.flags.intersection(parts):
            raise UnsupportedError(f"modifier {', '.join(sorted(found))}")


def each(body: str) -> str:
    return f"LANES(m) {{ {body} }}"


def half(value: str, upper: bool) -> str:
    return f"(u16)(({value}) >> {16 * upper})"


def compare(how: str, a: str, b: str, floating: bool) -> str:
    if how == "ne" and floating:  # false of a NaN
        return f"(({a} < {b}) || ({a} > {b}))"
    if how in COMPARISONS:
        return f"({a} {COMPARISONS[how]} {b})"
    if how == "num":
        return f"(({a} == {a}) && ({b} == {b}))"
    if how == "nan":
        return f"(({a} != {a}) || ({b} != {b}))"
    if how in UNORDERED:
        return f"(({a} != {a}) || ({b} != {b}) || ({a} {UNORDERED[how]} {b}))"
    raise UnsupportedError(f"comparison {how}")


class Translator:
    """Of one kernel: `source` is its C++, `unsupported` the instructions that raise when they are reached."""

    def __init__(self, module: Module, entry: Entry):
        self.module, self.entry = module, entry
        self.parameters = {parameter.name: parameter for parameter in entry.parameters}
        self.registers: dict[str, int] = {}
        self.declared = 0
        self.scopes: list[dict[str, Register | Address]] = [{}]
        self.shared: dict[str, int] = {}
        self.variables: list[str] = []
        self.shared_bytes = self.local_bytes = 0
        self.has_dynamic = False
        self.instructions: list[Instruction] = []
        self.unsupported: list[str] = []
        self.blocks = [Code()]
        for kind, text in statements(entry.body):
            self.statement(kind, text)
        self.source = self.write_source()

    # ---- what is declared

    def statement(self, kind: str, text: str) -> None:
        if kind == "{":
            self.scopes.append({})
        elif kind == "}":
            self.scopes.pop()
        elif kind == "label":
            if self.blocks[-1].lines:
                self.blocks.append(Code())
            self.blocks[-1].labels.append(text)
        elif text.startswith(".reg"):
            self.declare_registers(text)
        elif re.match(r"\.(shared|local)\b", text):
            self.declare_memory(text)
        elif re.match(r"\.pragma\b", text):
            pass
        elif text.startswith("."):
            raise UnsupportedError(f"directive {text[:80]!r}")
        else:
            self.instruction(text)

    def declare_registers(self, text: str) -> None:
        type_, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()
        for declared in split(names):
            name, count = re.match(r"([\w$%]+)\s*(?:<\s*(\d+)\s*>)?", declared).groups()
            if type_ not in TYPES:
                raise UnsupportedError(f"registers of type {type_}")
            # Numbered, as another scope may declare the same name.
            self.declared += 1
            c = f"r{self.declared}_" + re.sub(r"\W", "_", name)
            register = Register(f"{c}_" if count else c, TYPES[type_].bits, int(count or 1))
            self.scopes[-1][f"{name}<" if count else name] = register
            if not count:
                self.registers[c] = register.bits

    def declare_memory(self, text: str) -> None:
        for name, variable in parse_variables(text).items():
            if variable.space == "shared":
                self.shared_bytes = round_up(self.shared_bytes, variable.align)
                self.scopes[-1][name] = Address(f"{self.shared_bytes}u", "shared")
                self.shared_bytes += variable.size
            else:
                self.local_bytes = round_up(self.local_bytes, variable.align)
                self.scopes[-1][name] = Address(f"{self.local_bytes}u", "local")
                self.local_bytes += variable.size

    def register(self, name: str) -> Register | None:
        family, number = re.match(r"(.*?)(\d*)$", name).groups()
        for scope in reversed(self.scopes):
            found = scope.get(name)
            if isinstance(found, Register):
                return found
            # %r12 may be the register 12 of %r or 2 of %r1.
            for cut in range(len(number)):
                several = scope.get(f"{family}{number[:cut]}<")
                if several and int(number[cut:]) < several.count:
                    c = f"{several.c}{number[cut:]}"
                    self.registers[c] = several.bits
                    return Register(c, several.bits)
        return None

    def symbol(self, name: str) -> Address:
        for scope in reversed(self.scopes):
            if isinstance(scope.get(name), Address):
                return scope[name]
        if name in self.parameters:
            return Address(f"{self.parameters[name].offset}u", "param")
        if name not in self.module.variables:
            raise UnsupportedError(f"symbol {name}")
        variable = self.module.variables[name]
        if variable.dynamic:
            self.has_dynamic = True
            return Address("DYNAMIC_SHARED", "shared")
        if variable.space == "shared":
            if name not in self.shared:
                self.shared_bytes = round_up(self.shared_bytes, variable.align)
                self.shared[name] = self.shared_bytes
                self.shared_bytes += variable.size
            return Address(f"{self.shared[name]}u", "shared")
        if name not in self.variables:
            self.variables.append(name)
        return Address(f"variables[{self.variables.index(name)}]", variable.space)

    # ---- operands

    def read(self, operand: str, type_: str) -> str:
        """C++ for the operand's value in the current lane."""
        known = TYPES[type_]
        if operand.startswith("!"):
            return f"(!{self.read(operand[1:], type_)})"
        if register := self.register(operand):
            if register.bits == 1:
                return f"((w.{register.c} >> l) & 1u)"
            if known.kind == "f":
                return f"as_{type_}((u{known.bits})w.{register.c}[l])"
            return f"(({known.c})w.{register.c}[l])"
        if operand.startswith("%"):
            if operand not in SPECIAL:
                raise UnsupportedError(f"special register {operand}")
            return f"(({known.c})({SPECIAL[operand]}))"
        if re.match(r"-?\d", operand):
            return self.immediate(operand, type_)
        match = re.fullmatch(r"([\w$]+)\s*([+-]\s*\d+)?", operand)
        if not match:
            raise UnsupportedError(f"operand {operand}")
        return f"(({known.c})({self.symbol(match[1]).c} {match[2] or ''}))"

    def immediate(self, text: str, type_: str) -> str:
        known = TYPES[type_]
        sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
        for prefix, length, floating in (("0f", 8, "f32"), ("0d", 16, "f64")):
            if digits.lower().startswith(prefix) and len(digits) == length + 2:
                value = f"({sign}as_{floating}(0x{digits[2:]}ull))"
                return f"(({known.c}){value if known.kind == 'f' else f'bits_of({value})'})"
        if known.kind == "f":
            if "." in digits:
                return f"(({known.c}){text})"
            raise UnsupportedError(f"operand {text} of type {type_}")
        value = int(digits.rstrip("U"), 8 if re.fullmatch(r"0[0-7]+U?", digits) else 0)
        if known.kind == "p":
            return "1" if value else "0"
        return f"(({known.c}){(-value if sign else value) % 2**64}ull)"

    def write(self, operand: str, type_: str, value: str) -> str:
        """C++ that writes `value` to the operand's register in the current lane."""
        known = TYPES[type_]
        if operand == "_":
            return f"(void)({value});"
        register = self.register(operand)
        if not register:
            raise UnsupportedError(f"destination {operand}")
        if register.bits == 1:
            return f"SET_PREDICATE(w.{register.c}, {value});"
        holds = f"u{register.bits}"
        if known.kind == "f":
            return f"w.{register.c}[l] = ({holds})bits_of(({known.c})({value}));"
        if known.kind == "s" and known.bits < register.bits:  # with its sign
            return f"w.{register.c}[l] = ({holds})(s{register.bits})({known.c})({value});"
        return f"w.{register.c}[l] = ({holds})({known.c})({value});"

    def address(self, operand: str) -> tuple[str, str | None]:
        """C++ for what is between the brackets, and the space where a variable's name tells it."""
        match = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:(\+|-|\+\s*-)\s*(\w+))?\s*\]", operand)
        if not match:
            raise UnsupportedError(f"address {operand}")
        base, sign, offset = match.groups()
        space = None
        if register := self.register(base):
            value = f"(u64)w.{register.c}[l]"
        elif base[0].isdigit():
            value = f"{int(base, 0)}ull"
        else:
            symbol = self.symbol(base)
            value, space = f"(u64)({symbol.c})", symbol.space
        if offset:
            value = f"({value} {'-' if '-' in sign else '+'} {int(offset.rstrip('U'), 0)}ull)"
        return value, space

    def float_in(self, i: Instruction, place: int) -> str:
        value = self.read(i.operands[place], i.type)
        return f"flush({value})" if "ftz" in i.flags and i.type == "f32" else value

    def float_out(self, i: Instruction, value: str) -> str:
        if i.type == "f32" and "ftz" in i.flags:
            value = f"flush({value})"
        if "sat" in i.flags:
            value = f"saturate<{i.type}>({value})"
        return each(self.write(i.operands[0], i.type, f"canonical({value})" if i.type == "f32" else value))

    # ---- instructions

    def instruction(self, text: str) -> None:
        i = Instruction(text, len(self.instructions))
        self.instructions.append(i)
        together = i.base in (*COLLECTIVES, "bar", "barrier")
        if together and self.blocks[-1].lines:
            self.blocks.append(Code())
        try:
            code, members = self.translate(i), self.members(i)
        except UnsupportedError as error:
            self.unsupported.append(f"{i.text}: {error}")
            code = f'fail(b, w, __builtin_ctz(m), {i.number}, "unsupported instruction", 0);'
            members = None
        mask = "lanes"
        if i.guard:
            guard = self.register(i.guard.lstrip("!"))
            mask += f" & {'~' if i.guard[0] == '!' else ''}w.{guard.c}"
        block = self.blocks[-1]
        block.lines.append(f"{{ const u32 m = {mask}; if (m) {{ {code} }} }}")
        if members:
            block.members = members, mask, i.number
        block.transfers = i.base in TRANSFERS
        if block.transfers or i.base in ("bar", "barrier"):
            self.blocks.append(Code())

    def members(self, i: Instruction) -> str | None:
        """C++ for the mask of the lanes that have to arrive for a collective instruction."""
        if i.base in ("ldmatrix", "stmatrix"):
            return "0xffffffffu"
        if i.base in COLLECTIVES:
            return self.read(i.operands[-1], "u32")
        return self.read(i.operands[0], "u32") if i.base == "bar" and "warp" in i.flags else None

    def translate(self, i: Instruction) -> str:
        for part in i.parts:
            if part not in MODIFIERS and not CACHE_HINT.fullmatch(part):
                raise UnsupportedError(f"modifier {part}")
        if i.base in FENCES:
            return ""
        method = getattr(self, f"_{i.base}", None)
        if method is None:
            raise UnsupportedError(f"opcode {i.base}")
        return method(i)

    # ---- control

    def _bra(self, i: Instruction) -> str:
        return each(f"w.pc[l] = LABEL({i.operands[0]});")

    def _ret(self, i: Instruction) -> str:
        return "w.live &= ~m;"

    _exit = _ret

    def _trap(self, i: Instruction) -> str:
        return f'fail(b, w, __builtin_ctz(m), {i.number}, "trap", 0);'

    def _bar(self, i: Instruction) -> str:
        if "warp" in i.flags:
            return ""
        number = self.read(i.operands[0], "u32")
        threads = self.read(i.operands[1], "u32") if len(i.operands) > 1 else "0"
        return f"w.at_barrier |= m; {each(f'w.barrier[l] = {number}; w.expected[l] = {threads};')}"

    _barrier = _bar

    # ---- moves

    def _mov(self, i: Instruction) -> str:
        to, from_ = i.operands
        if i.type == "pred":
            return each(self.write(to, "pred", self.read(from_, "pred")))
        whole = f"b{TYPES[i.type].bits}"
        if to.startswith("{"):
            parts = vector(to)
            bits = TYPES[i.type].bits // len(parts)
            writes = [self.write(part, f"b{bits}", f"whole >> {bits * k}") for k, part in enumerate(parts)]
            return each(f"const auto whole = {self.read(from_, whole)}; {' '.join(writes)}")
        if from_.startswith("{"):
            parts = vector(from_)
            bits = TYPES[i.type].bits // len(parts)
            values = [f"(u64){self.read(part, f'b{bits}')} << {bits * k}" for k, part in enumerate(parts)]
            return each(self.write(to, whole, " | ".join(values)))
        return each(self.write(to, whole, self.read(from_, whole)))

    def _selp(self, i: Instruction) -> str:
        bits = f"b{TYPES[i.type].bits}"
        yes, no = (self.read(operand, bits) for operand in i.operands[1:3])
        return each(self.write(i.operands[0], bits, f"{self.read(i.operands[3], 'pred')} ? {yes} : {no}"))

    def _cvta(self, i: Instruction) -> str:
        space = i.one_of(("global", "const", "shared", "shared__cta", "local"))
        window = {"SHARED": "SHARED_WINDOW", "LOCAL": "LOCAL_WINDOW"}.get(SPACES[space], "0")
        value = f"{self.read(i.operands[1], i.type)} {'-' if 'to' in i.flags else '+'} {window}"
        return each(self.write(i.operands[0], i.type, value))

    # ---- memory

    def access(self, i: Instruction, operand: str, size: int, kind: str, body: str) -> str:
        """`body` for each lane, with `at` pointing to its memory."""
        address, named = self.address(operand)
        space = next((SPACES[part] for part in i.parts if part in SPACES), SPACES[named] if named else "GENERIC")
        checked = f"memory({space}, b, w, l, addresses[l], {size}, {kind}, {i.number})"
        if space in ("LOCAL", "PARAMETER"):
            return each(f"u8* at = {checked.replace('addresses[l]', address)}; {body}")
        return (
            f"u64 addresses[32]; LANES(m) {{ addresses[l] = {address}; u8* at = {checked}; {body} }} "
            f"count(*b.launch, {space}, {i.number}, m, addresses, {size}, {kind});"
        )

    def _ld(self, i: Instruction) -> str:
        to, count, size = vector(i.operands[0]), i.width(), TYPES[i.type].bytes
        bits = f"u{TYPES[i.type].bits}"
        as_type = bits if TYPES[i.type].kind == "f" else i.type
        if len(to) != count:
            raise UnsupportedError("registers for another number of values")
        # All are read before one is written, which may hold the address.
        reads = ", ".join(f"load<{bits}>(at + {size * k})" for k in range(count))
        writes = " ".join(self.write(name, as_type, f"values[{k}]") for k, name in enumerate(to))
        body = f"const {bits} values[] = {{{reads}}}; {writes}"
        return self.access(i, i.operands[1], size * count, "READ", body)

    def _st(self, i: Instruction) -> str:
        from_, size = vector(i.operands[1]), TYPES[i.type].bytes
        bits = f"u{TYPES[i.type].bits}"
        if len(from_) != i.width():
            raise UnsupportedError("registers for another number of values")
        stores = [f"store<{bits}>(at + {size * k}, {self.read(name, bits)});" for k, name in enumerate(from_)]
        return self.access(i, i.operands[0], size * len(from_), "WRITE", " ".join(stores))

    def _prefetch(self, i: Instruction) -> str:
        return self.access(i, i.operands[0], 1, "READ", "")

    def _atom(self, i: Instruction) -> str:
        i.refuse("v2", "v4", "v8", "f16", "bf16", "f16x2", "bf16x2")
        known, bits = TYPES[i.type], f"u{TYPES[i.type].bits}"
        to, (pointer, *values) = (None, i.operands) if i.base == "red" else (i.operands[0], i.operands[1:])
        operation = i.one_of(("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
        y, *third = (self.read(value, i.type) for value in values)
        new = {
            "add": f"x + {y}",
            "min": f"x < {y} ? x : {y}",
            "max": f"x > {y} ? x : {y}",
            "and": f"x & {y}",
            "or": f"x | {y}",
            "xor": f"x ^ {y}",
            "exch": y,
            "cas": f"x == {y} ? {third[0] if third else 0} : x",
            "inc": f"x >= {y} ? 0 : x + 1",
            "dec": f"x == 0 || x > {y} ? {y} : x - 1",
        }[operation]
        body = f"const {known.c} x = load<{known.c}>(at); store<{known.c}>(at, {new});"
        if to:
            body += self.write(to, i.type, "x")
        return self.access(i, pointer, TYPES[bits].bytes, "ATOMIC", body)

    _red = _atom

    def _ldmatrix(self, i: Instruction) -> str:
        """Matrix k has its 8 rows of 16 bytes at the addresses of lanes 8k to 8k+7. A lane gets two neighbours of row
        lane / 4, or of column lane / 4 where `trans`."""
        to = self.matrices(i, i.operands[0])
        values = (
            "load<u16>(rows[8 * {k} + 2 * (l & 3)] + 2 * (l >> 2)) | "
            "(u32)load<u16>(rows[8 * {k} + 2 * (l & 3) + 1] + 2 * (l >> 2)) << 16"
            if "trans" in i.flags
            else "load<u32>(rows[8 * {k} + (l >> 2)] + 4 * (l & 3))"
        )
        writes = [self.write(name, "b32", values.format(k=k)) for k, name in enumerate(to)]
        return self.rows_of_matrices(i, i.operands[1], len(to), "READ") + each(" ".join(writes))

    def _stmatrix(self, i: Instruction) -> str:
        """The same places as those of ldmatrix, written."""
        from_ = self.matrices(i, i.operands[1])
        stores = []
        for k, name in enumerate(from_):
            value = self.read(name, "b32")
            if "trans" in i.flags:
                for upper in (0, 1):
                    row = f"rows[8 * {k} + 2 * (l & 3) + {upper}]"
                    stores.append(f"store<u16>({row} + 2 * (l >> 2), {half(value, upper)});")
            else:
                stores.append(f"store<u32>(rows[8 * {k} + (l >> 2)] + 4 * (l & 3), {value});")
        return self.rows_of_matrices(i, i.operands[0], len(from_), "WRITE") + each(" ".join(stores))

    def matrices(self, i: Instruction, registers: str) -> list[str]:
        count = int(i.one_of(("x1", "x2", "x4"))[1:])
        found = vector(registers)
        if "m8n8" not in i.flags or i.type != "b16" or len(found) != count:
            raise UnsupportedError("matrices that are not 8 x 8 of 16 bits")
        return found

    def rows_of_matrices(self, i: Instruction, operand: str, count: int, kind: str) -> str:
        address, _ = self.address(operand)
        lanes = f"{2 ** (8 * count) - 1:#x}u"
        return (
            f"u8* rows[32]; u64 addresses[32]; LANES({lanes}) {{ addresses[l] = {address}; "
            f"rows[l] = memory(SHARED, b, w, l, addresses[l], 16, {kind}, {i.number}); }} "
            f"count(*b.launch, SHARED, {i.number}, {lanes}, addresses, 16, {kind}); "
        )

    # ---- collectives

    def _shfl(self, i: Instruction) -> str:
        mode = i.one_of(("up", "down", "bfly", "idx"))
        i.one_of(("sync",))
        to, _, valid = i.operands[0].partition("|")
        by, clamp = (self.read(operand, "u32") for operand in i.operands[2:4])
        # Lanes read before one is written.
        return (
            f"u32 given[32], got[32]; LANES(m) given[l] = {self.read(i.operands[1], 'b32')}; LANES(m) {{ bool valid; "
            f"const int from = shuffle_source(SHUFFLE_{mode.upper()}, l, {by}, {clamp}, valid); "
            f'if (!(m >> from & 1)) fail(b, w, l, {i.number}, "shfl from a lane that does not take part", from); '
            f"got[l] = given[from]; {self.write(valid, 'pred', 'valid') if valid else ''} }} "
            + each(self.write(to, "b32", "got[l]"))
        )

    def _vote(self, i: Instruction) -> str:
        mode, value = i.one_of(("all", "any", "uni", "ballot")), self.read(i.operands[1], "pred")
        result = {"all": "votes == m", "any": "votes != 0", "uni": "votes == 0 || votes == m", "ballot": "votes"}[mode]
        type_ = "b32" if mode == "ballot" else "pred"
        return f"u32 votes = 0; LANES(m) votes |= (u32){value} << l; {each(self.write(i.operands[0], type_, result))}"

    def _redux(self, i: Instruction) -> str:
        operation, c = i.one_of(("add", "min", "max", "and", "or", "xor")), TYPES[i.type].c
        value = self.read(i.operands[1], i.type)
        both = {"add": "so_far + x", "min": "std::min(so_far, x)", "max": "std::max(so_far, x)"}
        both = both.get(operation) or f"so_far {LOGICAL[operation]} x"
        return (
            f"{c} so_far = 0; bool first = true; "
            f"LANES(m) {{ const {c} x = {value}; so_far = first ? x : ({c})({both}); first = false; }} "
            f"{each(self.write(i.operands[0], i.type, 'so_far'))}"
        )

    # ---- arithmetic

    def is_float(self, i: Instruction) -> bool:
        """Of 32 or 64 bits; else an integer, as what has floats of 16 bits asks `is_half` first."""
        return TYPES[i.type].kind == "f"

    @staticmethod
    def is_half(i: Instruction) -> bool:
        return i.type in ("f16", "bf16", "f16x2", "bf16x2")

    def halves(self, i: Instruction, value) -> str:
        """`value` of the operands as C++ of 16 bits, for each half where there are two."""
        i.refuse("ftz", "sat")
        operands = [self.read(operand, i.type) for operand in i.operands[1:]]
        if not i.type.endswith("x2"):
            return each(self.write(i.operands[0], i.type, value(*operands)))
        low, high = (value(*(half(operand, upper) for operand in operands)) for upper in (0, 1))
        return each(self.write(i.operands[0], i.type, f"(u32)(u16){low} | (u32)(u16){high} << 16"))

    def half_floats(self, i: Instruction, formula: str) -> str:
        """A formula of x, y and z, computed in float64 and rounded once."""
        type_ = i.type.removesuffix("x2")

        def value(*operands: str) -> str:
            names = {name: f"(f64){type_}_to_f32({c})" for name, c in zip("xyz", operands, strict=False)}
            return f"f64_to_{type_}({formula.format(**names)})"

        return self.halves(i, value)

    def _add(self, i: Instruction) -> str:
        sign = {"add": "+", "sub": "-"}[i.base]
        if self.is_half(i):
            return self.half_floats(i, f"({{x}} {sign} {{y}})")
        if self.is_float(i):
            return self.float_out(i, f"({self.float_in(i, 1)} {sign} {self.float_in(i, 2)})")
        if i.type in ("u16x2", "s16x2"):
            return self.halves(i, lambda x, y: f"({x} {sign} {y})")
        x, y = (self.read(operand, i.type) for operand in i.operands[1:])
        if "sat" in i.flags:
            return each(self.write(i.operands[0], i.type, f"clamp_to<s32>((s64){x} {sign} (s64){y})"))
        unsigned = f"u{TYPES[i.type].bits}"
        return each(self.write(i.operands[0], i.type, f"({unsigned}){x} {sign} ({unsigned}){y}"))

    _sub = _add

    def _mul(self, i: Instruction) -> str:
        if self.is_half(i):
            return self.half_floats(i, "({x} * {y})")
        if self.is_float(i):
            return self.float_out(i, f"({self.float_in(i, 1)} * {self.float_in(i, 2)})")
        type_, value = self.product(i)
        return each(self.write(i.operands[0], type_, value))

    def _mad(self, i: Instruction) -> str:
        if self.is_float(i):
            return self._fma(i)
        i.refuse("sat")
        type_, value = self.product(i)
        unsigned = f"u{TYPES[type_].bits}"
        return each(
            self.write(i.operands[0], type_, f"({unsigned})({value}) + ({unsigned}){self.read(i.operands[3], type_)}")
        )

    def product(self, i: Instruction) -> tuple[str, str]:
        """The type and the value of an integer product's low or high half or of the whole."""
        known = TYPES[i.type]
        x, y = (self.read(operand, i.type) for operand in i.operands[1:3])
        if "wide" in i.flags:
            wide = f"{known.kind}{2 * known.bits}"
            return wide, f"(({wide}){x} * ({wide}){y})"
        if "hi" in i.flags:
            return i.type, f"multiply_high<{known.c}>({x}, {y})"
        return i.type, f"((u{known.bits})((u64){x} * (u64){y}))"

    def _fma(self, i: Instruction) -> str:
        if self.is_half(i):
            return self.half_floats(i, "({x} * {y} + {z})")
        operands = ", ".join(self.float_in(i, place) for place in (1, 2, 3))
        return self.float_out(i, f"{'__builtin_fmaf' if i.type == 'f32' else '__builtin_fma'}({operands})")

    def _div(self, i: Instruction) -> str:
        if self.is_float(i):
            return self.float_out(i, self.quotient(i, self.float_in(i, 1), self.float_in(i, 2)))
        return self.integers(i, "divide")

    def _rem(self, i: Instruction) -> str:
        return self.integers(i, "remainder_of")

    @staticmethod
    def quotient(i: Instruction, x: str, y: str) -> str:
        """Where an approximation is asked for the nearest float: a GPU may differ by one or two units."""
        if i.flags & {"approx", "full"}:
            if i.type != "f32":
                raise UnsupportedError("an approximation in float64")
            return f"(f32)((f64){x} / (f64){y})"
        return f"({x} / {y})"

    def _rcp(self, i: Instruction) -> str:
        return self.float_out(i, self.quotient(i, f"({i.type})1", self.float_in(i, 1)))

    def _sqrt(self, i: Instruction) -> str:
        return self.float_out(i, f"({i.type})std::sqrt((f64){self.float_in(i, 1)})")

    def approximate(self, i: Instruction, function: str) -> str:
        if i.type != "f32":
            raise UnsupportedError("an approximation of another type")
        return self.float_out(i, f"(f32)({function.format(x=f'(f64){self.float_in(i, 1)}')})")

    def _rsqrt(self, i: Instruction) -> str:
        return self.approximate(i, "1 / std::sqrt({x})")

    def _sin(self, i: Instruction) -> str:
        return self.approximate(i, "std::sin({x})")

    def _cos(self, i: Instruction) -> str:
        return self.approximate(i, "std::cos({x})")

    def _ex2(self, i: Instruction) -> str:
        return self.approximate(i, "std::exp2({x})")

    def _lg2(self, i: Instruction) -> str:
        return self.approximate(i, "std::log2({x})")

    def _tanh(self, i: Instruction) -> str:
        return self.approximate(i, "std::tanh({x})")

    def _neg(self, i: Instruction) -> str:
        if self.is_half(i):
            return self.halves(i, lambda x: f"({x} ^ 0x8000u)")
        if self.is_float(i):
            return each(self.write(i.operands[0], i.type, f"-{self.float_in(i, 1)}"))
        return each(self.write(i.operands[0], i.type, f"0 - (u64){self.read(i.operands[1], i.type)}"))

    def _abs(self, i: Instruction) -> str:
        if self.is_half(i):
            return self.halves(i, lambda x: f"({x} & 0x7fffu)")
        if self.is_float(i):
            return each(self.write(i.operands[0], i.type, f"std::fabs({self.float_in(i, 1)})"))
        x = self.read(i.operands[1], i.type)
        return each(self.write(i.operands[0], i.type, f"{x} < 0 ? 0 - (u64){x} : (u64){x}"))

    def _min(self, i: Instruction) -> str:
        function = f"{i.base}_{'nan' if 'NaN' in i.flags else 'number'}"
        if self.is_half(i):
            return self.half_floats(i, f"{function}<f64>({{x}}, {{y}})")
        if self.is_float(i):
            values = [self.float_in(i, place) for place in range(1, len(i.operands))]
            return self.float_out(i, functools.reduce(lambda x, y: f"{function}<{i.type}>({x}, {y})", values))
        if i.type in ("u16x2", "s16x2"):
            c = f"{i.type[0]}16"
            return self.halves(i, lambda x, y: f"std::{i.base}<{c}>({x}, {y})")
        return self.integers(i, f"std::{i.base}")

    _max = _min

    def _copysign(self, i: Instruction) -> str:
        sign, value = (self.read(operand, i.type) for operand in i.operands[1:])
        return each(self.write(i.operands[0], i.type, f"std::copysign({value}, {sign})"))

    # ---- bits

    def integers(self, i: Instruction, function: str) -> str:
        c = TYPES[i.type].c
        x, y = (self.read(operand, i.type) for operand in i.operands[1:])
        return each(self.write(i.operands[0], i.type, f"{function}<{c}>({x}, {y})"))

    def _and(self, i: Instruction) -> str:
        x, y = (self.read(operand, i.type) for operand in i.operands[1:])
        return each(self.write(i.operands[0], i.type, f"{x} {LOGICAL[i.base]} {y}"))

    _or = _xor = _and

    def _not(self, i: Instruction) -> str:
        sign = "!" if i.type == "pred" else "~"
        return each(self.write(i.operands[0], i.type, f"{sign}{self.read(i.operands[1], i.type)}"))

    def _lop3(self, i: Instruction) -> str:
        i.refuse("and", "or")
        x, y, z = (self.read(operand, "b32") for operand in i.operands[1:4])
        return each(self.write(i.operands[0], "b32", f"lop3({x}, {y}, {z}, {int(i.operands[4], 0)})"))

    def _shl(self, i: Instruction) -> str:
        x, count = self.read(i.operands[1], i.type), self.read(i.operands[2], "u32")
        function = {"shl": "shift_left", "shr": "shift_right"}[i.base]
        return each(self.write(i.operands[0], i.type, f"{function}<{TYPES[i.type].c}>({x}, {count})"))

    _shr = _shl

    def _shf(self, i: Instruction) -> str:
        low, high, count = (self.read(operand, "u32") for operand in i.operands[1:])
        count = f"({count} & 31)" if i.one_of(("wrap", "clamp")) == "wrap" else f"std::min<u32>({count}, 32)"
        both = f"((u64){high} << 32 | {low})"
        shifted = f"{both} << {count} >> 32" if i.one_of(("l", "r")) == "l" else f"{both} >> {count}"
        return each(self.write(i.operands[0], "b32", shifted))

    def _bfe(self, i: Instruction) -> str:
        first, count = (self.read(operand, "u32") for operand in i.operands[2:])
        value = f"extract_bits<{TYPES[i.type].c}>({self.read(i.operands[1], i.type)}, {first}, {count})"
        return each(self.write(i.operands[0], i.type, value))

    def _bfi(self, i: Instruction) -> str:
        from_, into = (self.read(operand, i.type) for operand in i.operands[1:3])
        first, count = (self.read(operand, "u32") for operand in i.operands[3:])
        return each(
            self.write(i.operands[0], i.type, f"insert_bits<{TYPES[i.type].c}>({from_}, {into}, {first}, {count})")
        )

    def _bfind(self, i: Instruction) -> str:
        return each(
            self.write(i.operands[0], "u32", f"highest_bit<{TYPES[i.type].c}>({self.read(i.operands[1], i.type)})")
        )

    def _brev(self, i: Instruction) -> str:
        value = f"reverse_bits<{TYPES[i.type].c}>({self.read(i.operands[1], i.type)})"
        return each(self.write(i.operands[0], i.type, value))

    def _popc(self, i: Instruction) -> str:
        return each(self.write(i.operands[0], "u32", f"__builtin_popcountll({self.read(i.operands[1], i.type)})"))

    def _clz(self, i: Instruction) -> str:
        x, bits = self.read(i.operands[1], i.type), TYPES[i.type].bits
        return each(self.write(i.operands[0], "u32", f"{x} ? __builtin_clzll({x}) - {64 - bits} : {bits}"))

    def _prmt(self, i: Instruction) -> str:
        operands = ", ".join(self.read(operand, "b32") for operand in i.operands[1:])
        return each(self.write(i.operands[0], "b32", f"permute_bytes({operands})"))

    # ---- comparisons and conversions

    def _setp(self, i: Instruction) -> str:
        """Two predicates are those of the two halves, or the comparison and its opposite."""
        how = i.parts[0]
        combine = next((part for part in i.parts[1:] if part in LOGICAL), None)
        to, _, second = i.operands[0].partition("|")
        if self.is_half(i):
            i.refuse("ftz")
            type_ = i.type.removesuffix("x2")
            x, y = (self.read(operand, i.type) for operand in i.operands[1:3])
            pair = [
                compare(how, *(f"{type_}_to_f32({half(value, upper)})" for value in (x, y)), True) for upper in (0, 1)
            ]
            if second and not i.type.endswith("x2"):
                raise UnsupportedError("two predicates of one comparison in 16 bits")
        else:
            yes = compare(how, self.float_in(i, 1), self.float_in(i, 2), self.is_float(i))
            pair = [yes, f"!{yes}"]
        if combine:
            also = f"(bool){self.read(i.operands[3], 'pred')}"
            pair = [f"{one} {LOGICAL[combine]} {also}" for one in pair]
        # Both are known before one is written, which may be an operand.
        writes = self.write(to, "pred", "first") + (self.write(second, "pred", "other") if second else "")
        return each(f"const bool first = {pair[0]}, other = {pair[1]}; {writes}")

    def _cvt(self, i: Instruction) -> str:
        if len(i.types) < 2:
            raise UnsupportedError(f"a type of {i.text!r}")
        to, from_ = i.types[0], i.types[-1]
        if to in ("f16x2", "bf16x2"):
            type_ = to.removesuffix("x2")
            high, low = (f"f32_to_{type_}({self.converted(i, operand, 'f32')})" for operand in i.operands[1:])
            return each(self.write(i.operands[0], "b32", f"(u32){high} << 16 | {low}"))
        x = self.converted(i, i.operands[1], from_)
        floats = ("f16", "bf16", "f32", "f64")
        rounding = next((ROUNDINGS[part] for part in i.parts if part in ROUNDINGS), None)
        if from_ in floats and to not in floats:
            value = f"to_integer<{TYPES[to].c}>({x}, {rounding or 'NEAREST'})"
        elif from_ not in floats and to not in floats:
            value = f"clamp_to<{TYPES[to].c}>({x})" if "sat" in i.flags else x
        else:
            value = f"round_to_integer({x}, {rounding})" if rounding else x
            if "sat" in i.flags:
                value = f"saturate({value})"
            if to in ("f16", "bf16"):
                if TYPES[from_].bits == 64 and from_ != "f64":
                    raise UnsupportedError("it would be rounded twice")
                value = f"f{'32' if from_ in ('f16', 'bf16', 'f32') else '64'}_to_{to}({value})"
            elif to == "f32" and "ftz" in i.flags:
                value = f"flush((f32)({value}))"
        return each(self.write(i.operands[0], to, value))

    def converted(self, i: Instruction, operand: str, type_: str) -> str:
        """The operand as a C++ number."""
        value = self.read(operand, type_)
        if type_ in ("f16", "bf16"):
            value = f"{type_}_to_f32({value})"
        elif type_ == "f32" and "ftz" in i.flags:
            value = f"flush({value})"
        return value

    # ---- the whole

    def write_source(self) -> str:
        labels = {label: number for number, block in enumerate(self.blocks) for label in block.labels}
        names = ",\n".join('"' + i.text.replace("\\", "\\\\").replace('"', '\\"') + '"' for i in self.instructions)
        registers = "\n".join(
            f"  u32 {c};" if bits == 1 else f"  u{bits} {c}[32];" for c, bits in sorted(self.registers.items())
        )
        dynamic = round_up(self.shared_bytes, 128) if self.has_dynamic else self.shared_bytes
        needs, steps = [], []
        for number, block in enumerate(self.blocks):
            if block.members:
                members, mask, instruction = block.members
                needs.append(
                    f"    case {number}: {{ const u32 m = {mask}; if (!m) return false; "
                    f"const int l = __builtin_ctz(m); (void)l; "
                    f"members = {members}; instruction = {instruction}; return members != 0; }}"
                )
            lines = [re.sub(r"LABEL\((.*?)\)", lambda match: str(labels[match[1]]), line) for line in block.lines]
            # A transfer changes where the lanes go on.
            lines.insert(len(lines) - block.transfers, f"LANES(lanes) w.pc[l] = {number + 1};")
            steps.append("\n      ".join([f"    case {number}: {{", *lines, "break; }"]))
        return SOURCE.format(
            names=names, variables=max(1, len(self.variables)), local_bytes=self.local_bytes, dynamic=dynamic,
            registers=registers, needs="\n".join(needs), steps="\n".join(steps),
        )  # fmt: skip


def vector(operand: str) -> list[str]:
    return [part.strip() for part in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


SOURCE = """\
#include "runtime.h"
const char* const INSTRUCTIONS[] = {{{names}}};
extern "C" {{ u64 variables[{variables}]; }}
static const u32 LOCAL_BYTES = {local_bytes}, DYNAMIC_SHARED = {dynamic};
struct Warp : WarpState {{
  u32 thread[3][32];
{registers}
}};
static bool needs(Block& b, Warp& w, u32 pc, u32 lanes, u32& members, int& instruction) {{
  switch (pc) {{
{needs}
    default: return false;
  }}
}}
static void step(Block& b, Warp& w, u32 pc, u32 lanes) {{
  switch (pc) {{
{steps}
    default: w.live &= ~lanes;
  }}
}}
#include "scheduler.h"
"""
