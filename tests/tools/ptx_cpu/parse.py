"""Reads PTX text: its kernels, their parameters, the variables of the module, and the statements of a kernel."""

import dataclasses
import re
import struct
from collections.abc import Iterator


class PtxError(RuntimeError):
    """PTX that cannot be run, or a fault that was found while it ran."""


class UnsupportedError(PtxError):
    """PTX that is not known here."""


@dataclasses.dataclass(frozen=True)
class Type:
    """A PTX type: the C++ type it is read as, its bits, and u, s, f or p for unsigned, signed, float and predicate."""

    c: str
    bits: int
    kind: str

    @property
    def bytes(self) -> int:
        return self.bits // 8


TYPES = {
    **{f"{kind}{bits}": Type(f"u{bits}", bits, "u") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": Type(f"s{bits}", bits, "s") for bits in (8, 16, 32, 64)},
    "f32": Type("f32", 32, "f"),
    "f64": Type("f64", 64, "f"),
    # Held as bits: the arithmetic converts them.
    "f16": Type("u16", 16, "u"),
    "bf16": Type("u16", 16, "u"),
    **{name: Type("u32", 32, "u") for name in ("f16x2", "bf16x2", "u16x2", "s16x2")},
    "pred": Type("bool", 1, "p"),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kernel. `head` is what stands before its body."""

    name: str
    head: str
    body: str
    parameters: list[Parameter]
    parameter_bytes: int


@dataclasses.dataclass(frozen=True)
class Variable:
    """`dynamic` is shared memory whose size the launch gives."""

    space: str
    align: int
    size: int
    data: bytes | None
    dynamic: bool


@dataclasses.dataclass(frozen=True)
class Module:
    entries: dict[str, Entry]
    variables: dict[str, Variable]


def without_notes(text: str) -> str:
    """The text without comments and debug information."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    while section := re.search(r"^\s*\.section\b", text, flags=re.MULTILINE):
        text = text[: section.start()] + text[end_of_braces(text, text.index("{", section.start())) :]
    return re.sub(r"^\s*\.(loc|file|version|target|address_size)\b[^\n]*", "", text, flags=re.MULTILINE)


def end_of_braces(text: str, start: int) -> int:
    """Past the brace that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise PtxError("a brace is not closed")


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for char in text:
        depth += (char in "({[<") - (char in ")}]>")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [part for part in [*parts, part.strip()] if part]


def statements(body: str) -> Iterator[tuple[str, str]]:
    """("{", ""), ("}", ""), ("label", name) and ("statement", text), in order."""
    label, statement, place = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)"), re.compile(r"[^;]+"), 0
    while place < len(body):
        if body[place].isspace() or body[place] == ";":
            place += 1
        elif body[place] in "{}":
            yield body[place], ""
            place += 1
        elif match := label.match(body, place):
            yield "label", match[1]
            place = match.end()
        else:
            match = statement.match(body, place)
            yield "statement", match[0].strip()
            place = match.end()


def parse(text: str) -> Module:
    text, place = without_notes(text), 0
    entries: dict[str, Entry] = {}
    variables: dict[str, Variable] = {}
    while match := re.compile(r"\S").search(text, place):
        start = match.start()
        end = re.compile(r"[;{]|$").search(text, start)
        head = text[start : end.start()]
        if re.search(r"\.(entry|func)\b", head):
            if end[0] == ";":  # a prototype
                place = end.end()
                continue
            place = end_of_braces(text, end.start())
            if ".entry" in head:
                entry = parse_entry(head, text[end.end() : place - 1])
                entries[entry.name] = entry
        else:
            place = text.find(";", start) + 1 or len(text)
            variables.update(parse_variables(text[start:place].rstrip("; \n")))
    return Module(entries, variables)


def parse_entry(head: str, body: str) -> Entry:
    name = re.search(r"\.entry\s+([\w$]+)", head)
    listed = re.search(r"\((.*)\)", head[name.end() :], flags=re.DOTALL)
    parameters, offset = [], 0
    for text in split(listed[1]) if listed else []:
        array = re.search(r"([\w$]+)\s*\[(\d+)\]", text)
        type_ = next(part for part in re.findall(r"\.([a-z]\w*)", text) if part in TYPES)
        size = TYPES[type_].bytes
        # What `.ptr .align` says is of the memory pointed to.
        align = re.search(r"\.align\s+(\d+)", text) if ".ptr" not in text else None
        offset = round_up(offset, int(align[1]) if align else size)
        size *= int(array[2]) if array else 1
        parameters.append(Parameter(array[1] if array else text.split()[-1], type_, offset, size))
        offset += size
    return Entry(name[1], head, body, parameters, offset)


def parse_variables(text: str) -> dict[str, Variable]:
    """What one declaration of memory declares."""
    match = re.match(r"((?:\.\w+(?:\s+\d+(?=\s))?\s+)+)(.*)", text.strip(), flags=re.DOTALL)
    if not match:
        raise UnsupportedError(f"declaration {text[:100]!r}")
    qualifiers, rest = match.groups()
    if ".pragma" in qualifiers:
        return {}
    space = re.search(r"\.(global|const|shared|local)\b", qualifiers)
    types = [part for part in re.findall(r"\.(\w+)", qualifiers) if part in TYPES]
    if not space or not types:
        raise UnsupportedError(f"declaration {text[:100]!r}")
    align, width = re.search(r"\.align\s+(\d+)", qualifiers), re.search(r"\.v(\d)\b", qualifiers)
    size = TYPES[types[-1]].bytes * (int(width[1]) if width else 1)
    rest, _, initial = rest.partition("=")
    data = b"".join(constant(value, types[-1]) for value in split(re.sub(r"[{}]", " ", initial))) if initial else None
    found = {}
    for declared in split(rest):
        name = re.match(r"[\w$]+", declared)[0]
        lengths = re.findall(r"\[\s*(\d*)\s*\]", declared)
        total = size
        for length in lengths:
            total *= int(length or 0)
        if "" in lengths and data:
            total = len(data)
        dynamic = space[1] == "shared" and "" in lengths
        found[name] = Variable(space[1], int(align[1]) if align else size, total, data, dynamic)
    return found


def constant(text: str, type_: str) -> bytes:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return struct.pack("<I", int(match[1], 16))
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return struct.pack("<Q", int(match[1], 16))
    if not re.match(r"-?\d", text):
        raise UnsupportedError(f"initial value {text!r}")
    size = TYPES[type_].bytes
    return (int(text.rstrip("U"), 0) % (1 << (8 * size))).to_bytes(size, "little")


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
