"""What a compiled program takes, read from its text: bytes moved and collectives, loops multiplied.

The compiler's own cost analysis counts the body of a loop once. Here every computation counts as
often as it runs. The text of XLA is no interface, so tests hold this to programs whose answer is
known.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}  # others end with their bits
# Instructions that move nothing of their own.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "iota", "opt-barrier"),
}
_PARTIAL = {"dynamic-slice", "slice", "gather"}  # which read as much as they give
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """Bytes of all runs of collectives of one kind over the same mesh axes, per device.

    bytes: of the larger of operand and result. size: devices that take part in one.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    count: int
    bytes: int


class Instruction(NamedTuple):
    name: str
    kind: str
    bytes: int  # of the result, without what lies in on-chip memory
    operands: list[str]
    text: str


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program on this mesh, the largest first."""
    computations, times = _parse(text), _times(text)
    found = {}
    for name, instructions in computations.items():
        for place, (_, kind, _, _, line) in enumerate(instructions):
            kind = kind.removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            groups = replica_groups(line, mesh.size)
            size = len(groups[0])
            moved = _bytes(line.partition(" = ")[2].partition(f" {kind}")[0], everywhere=True)
            if f"{kind}-start" in line and kind == "all-gather":
                moved = moved * size // (size + 1)  # the result is a pair of operand and result
            if name.startswith("all-reduce-scatter"):  # a fusion that keeps one part
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                moved *= size
            # A collective in several steps is written once per step, with the same channel.
            channel = re.search(r"channel_id=(\d+)", line)
            key = (kind, channel[1]) if channel else (name, place)
            row = (kind, _axes(groups, mesh), size, times[name], moved * times[name])
            found[key] = max(row, found.get(key, row), key=lambda row: row[4])
    sums = collections.defaultdict(lambda: [0, 0])
    for kind, axes, size, count, moved in found.values():
        sums[kind, axes, size][0] += count
        sums[kind, axes, size][1] += int(moved)
    rows = [Collective(*key, *values) for key, values in sums.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def bytes_moved(text: str) -> int:
    """Bytes that the instructions of a program read from and write to the device's memory.

    Of what is read or written in part, that part counts.
    """
    computations, times = _parse(text), _times(text)
    fused = set(re.findall(r"calls=%?([\w.\-]+)", text))
    total = 0
    for name, instructions in computations.items():
        if name in fused or not times[name]:
            continue
        sizes = {instruction.name: instruction.bytes for instruction in instructions}
        for instruction in instructions:
            if instruction.kind not in _FREE and not instruction.kind.endswith("-done"):
                total += times[name] * _moved(instruction, sizes, computations)
    return int(total)


def _moved(instruction, sizes, computations):
    """Bytes that one instruction moves, `sizes` being those of its operands."""
    _, kind, written, operands, line = instruction
    read = [sizes.get(operand, 0) for operand in operands]
    if kind.endswith("-start"):  # its type names operands and results
        return 0 if _CALLED.search(line) else written
    if kind in _PARTIAL:
        return 2 * written
    if kind == "dynamic-update-slice":
        return 2 * read[1]
    body = _CALLED.search(line) if kind == "fusion" else None
    inner = computations.get(body[1], ()) if body else ()
    inner_sizes = {other.name: other.bytes for other in inner}
    for other in inner:
        if other.kind == "dynamic-update-slice" and other.bytes == written:
            written = inner_sizes.get(other.operands[1], 0)  # the rest stays where it is
        if other.kind == "parameter":
            place = int(re.search(r"parameter\((\d+)\)", other.text)[1])
            users = [user for user in inner if other.name in user.operands]
            if place < len(read) and users:
                read[place] = min(
                    read[place], sum(_part(user, other, inner_sizes) for user in users)
                )
    return written + sum(read)


def _part(user, operand, sizes):
    """Bytes of an operand that an instruction inside a fusion reads."""
    if user.kind in _PARTIAL:
        return user.bytes
    if user.kind == "dynamic-update-slice" and user.operands[0] == operand.name:
        return 0
    return operand.bytes


def replica_groups(line: str, devices: int) -> np.ndarray:
    """[groups, devices of a group] of a collective, from any of XLA's three spellings."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=(\{\{[\d,{}]*\}\})", line):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sizes, order = (_numbers(part) for part in match.groups())
        return _iota(sizes, order).reshape(shape)
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" \{([^}]*)\}",
        line,
    ):
        axes = re.findall(r"'([^']+)'=(\d+)", match[1])
        names, shape = [name for name, _ in axes], [int(size) for _, size in axes]
        ids = _iota(_numbers(match[2]) or [math.prod(shape)], _numbers(match[3])).reshape(shape)
        chosen = [names.index(name) for name in re.findall(r"'([^']+)'", match[4])]
        others = [place for place in range(len(names)) if place not in chosen]
        size = math.prod(shape[place] for place in chosen)
        return ids.transpose(others + chosen).reshape(-1, size)
    return np.arange(devices)[None]


def _numbers(text):
    return [int(n) for n in text.split(",")] if text else []


def _iota(sizes, order):
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(order) if order else ids


def _axes(groups, mesh):
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(groups, mesh.devices.shape))  # [axes, groups, devices]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, is_split in zip(mesh.axis_names, differ) if is_split)


def _parse(text) -> dict[str, list[Instruction]]:
    """{computation: its instructions}."""
    found, current = {}, None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            current = found.setdefault(head[1], [])
        elif match := re.match(r"  (?:ROOT )?%?([\w.\-]+) = (.*)", line):
            shape, kind = _split(match[2])
            if current is not None and kind:
                inner = match[2].partition(f" {kind}(")[2].partition("), ")[0]
                operands = re.findall(r"%([\w.\-]+)", inner)
                current.append(Instruction(match[1], kind, _bytes(shape), operands, line))
    return found


def _split(text):
    """(the type, the name of the operation) of the right side of an instruction."""
    depth, end = 0, len(text)
    for place, letter in enumerate(text):  # tuples, and layouts inside them, have brackets
        depth += (letter == "(") - (letter == ")")
        if letter == " " and not depth:
            end = place
            break
    match = re.match(r" ([\w\-]+)\(", text[end:])
    return text[:end], match[1] if match else None


def _bytes(shape, everywhere=False):
    """Bytes of a type of XLA, a tuple too. S(1) in a layout is memory on the chip."""
    total = 0
    for dtype, sizes, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if not everywhere and re.search(r"S\([1-9]\)", layout):
            continue
        bits = re.match(r"[a-z]+(\d+)", dtype)
        width = _WIDTHS.get(dtype) or (int(bits[1]) / 8 if bits else 0)
        total += width * math.prod(_numbers(sizes))
    return total


def _times(text) -> collections.Counter:
    """How often each computation runs."""
    computations = _parse(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    times, waiting = collections.Counter(), [(entry[1], 1)]
    while waiting:
        name, count = waiting.pop()
        times[name] += count
        for instruction in computations.get(name, ()):
            line = instruction.text
            turns = _turns(line, computations) if instruction.kind == "while" else 1
            branches = _BRANCHES.search(line)
            called = _CALLED.findall(line) + (
                re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            )
            waiting += [(other, count * turns) for other in called if other in computations]
    return times


def _turns(line, computations):
    """The turns of a loop: stated, or the constant that its condition compares with."""
    if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    constants = [
        int(match[1])
        for instruction in computations.get(condition[1] if condition else "", ())
        if (match := re.search(r"s32\[\][^=]* constant\((\d+)\)", instruction.text))
    ]
    return max(constants, default=1)
