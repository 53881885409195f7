"""Reads the HLO text of a compiled program: its collectives, and what stands between their ends."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

KINDS = ("collective-permute", "all-gather", "all-reduce", "reduce-scatter", "all-to-all")
LINKS = ("inside workers", "between workers", "between slices")

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str
    """One of `KINDS`."""
    link: str
    """One of `LINKS`; `between workers` is inside a slice."""
    is_asynchronous: bool
    """Started and awaited apart, so that other work may stand between."""
    size: int
    """Bytes of its first array, on one device."""
    products: int
    """Matrix products, and loops over such, that stand between its start and its end."""
    computation: str
    """The part of the program that it stands in."""


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    text: str
    """What follows the opcode."""


def collectives(program: str, chips_per_worker: int) -> list[Collective]:
    """All collectives of a program whose instructions stand in the order of their execution.

    chips_per_worker: so many consecutive devices make a worker. No worker spans slices.
    Raises ValueError for a collective whose devices are written in a way that is not known here.
    """
    computations = _parse(program)
    has_product = _product_finder(computations)
    found: dict[str, Collective] = {}
    for computation, instructions in computations.items():
        products = 0
        for one in instructions:
            products += has_product(one)
            if one.opcode.endswith("-done") and (start := _operand(one)) in found:
                since = products + found[start].products
                found[start] = replace(found[start], products=since)
            elif collective := _collective(one, computation, chips_per_worker):
                # A fusion that spreads a collective over other work repeats it, with one chain_id.
                name = _attribute(one, "chain_id") or one.name
                found[name] = replace(collective, products=-products)
    return [replace(one, products=max(one.products, 0)) for one in found.values()]


def _collective(one: _Instruction, computation: str, chips_per_worker: int) -> Collective | None:
    """The collective that this instruction is or begins, if it does."""
    kind, is_asynchronous = one.opcode.removesuffix("-start"), one.opcode.endswith("-start")
    if kind in KINDS:
        link = _link(one.text, chips_per_worker)
        is_asynchronous |= "chain_id=" in one.text or "async_collective_name=" in one.text
    elif one.opcode == "recv":  # between slices; the send, its other half, stands nearby
        kind = (_attribute(one, "_xla_megascale_transfer_type") or "ONE_TO_ONE").lower()
        kind = "collective-permute" if kind == "one_to_one" else kind.replace("_", "-")
        link, is_asynchronous = LINKS[2], True
    else:
        return None
    return Collective(kind, link, is_asynchronous, _first_array_bytes(one.type), 0, computation)


def _parse(program: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in program.splitlines():
        if re.match(r"(ENTRY )?%?\S+ \(.*\{$", line):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = computations.setdefault(name, [])
        elif match := re.match(r"\s+(?:ROOT )?%?(\S+) = (.*)", line):
            kind, rest = _split_type(match[2])
            opcode, _, text = rest.partition("(")
            current.append(_Instruction(match[1], kind, opcode, text))
    return computations


def _split_type(text: str) -> tuple[str, str]:
    """`f32[8]{0} add(...)` or `(f32[8], f32[]) add(...)` -> (type, the rest)."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == " " and depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _product_finder(
    computations: dict[str, list[_Instruction]],
) -> Callable[[_Instruction], bool]:
    """A function: whether an instruction multiplies matrices, itself or in what it calls."""

    @cache
    def inside(name: str) -> bool:
        return any(has_product(one) for one in computations.get(name, []))

    def has_product(one: _Instruction) -> bool:
        if one.opcode in ("convolution", "dot"):
            return True
        called = re.findall(
            r"(?:calls|body|\w+_computations?)=\{?(%[^,}\s]+(?:, ?%[^,}\s]+)*)", one.text
        )
        return any(inside(name) for group in called for name in re.findall(r"%([^,\s]+)", group))

    return has_product


def _link(text: str, chips_per_worker: int) -> str:
    for group in _device_groups(text):
        if len({device // chips_per_worker for device in group}) > 1:
            return LINKS[1]
    return LINKS[0]


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<sizes>(?:'\w+'=\d+,?)+)\]"
    r"(?:, device_ids=\(\[(?P<shape>[\d,]+)\](?:T\((?P<turned>[\d,]+)\))?\))?"
    r" \{(?P<within>(?:'\w+',?)*)\}"
)


def _device_groups(text: str) -> list[list[int]]:
    """The devices that each group, or each pair of a permutation, connects.

    They are written out, `{{0,1},{2,3}}`; or as all devices, reshaped, transposed and dealt to
    groups, `[4,2]<=[2,4]T(1,0)`; or by axes of the mesh, `mesh['a'=2,'b'=4] {'a'}`, whose devices
    may be reshaped and transposed too, `mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}`.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", text):
        return [_integers(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, shape, order = map(_integers, match.groups(default=""))
        devices = np.arange(math.prod(shape)).reshape(shape)
        return devices.transpose(order or None).reshape(groups).tolist()
    if match := _MESH_GROUPS.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["sizes"])}
        within = re.findall(r"'(\w+)'", match["within"])
        order = [list(sizes).index(name) for name in [n for n in sizes if n not in within] + within]
        devices = np.arange(math.prod(sizes.values()))
        if match["shape"]:
            devices = devices.reshape(_integers(match["shape"]))
            devices = devices.transpose(_integers(match["turned"] or "") or None)
        size = math.prod(sizes[name] for name in within)
        return devices.reshape(*sizes.values()).transpose(order).reshape(-1, size).tolist()
    raise ValueError(f"a collective whose devices cannot be read: {text[:200]}")


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _attribute(one: _Instruction, name: str) -> str | None:
    match = re.search(rf'{name}="([^"]*)"', one.text)
    return match[1] if match else None


def _operand(one: _Instruction) -> str:
    return re.split(r"[,)]", one.text)[0].split(" ")[-1].lstrip("%")


def _first_array_bytes(kind: str) -> int:
    match = re.search(r"(\w+)\[([\d,]*)\]", kind)
    if match is None:
        return 0
    return _ITEM_BYTES[match[1]] * math.prod(int(n) for n in match[2].split(",") if n)
