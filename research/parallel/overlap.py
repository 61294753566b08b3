"""What a compiled program for GPUs exchanges, and what it computes meanwhile: read off the text of its schedule."""

import math
import re
from typing import NamedTuple

KINDS = r"all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
WORK = re.compile(r" (?:fusion|custom-call|dot|convolution|sort|scatter|while|conditional|call)\(")
COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(")
NAME = re.compile(r'op_name="([^"]*)"')


class Exchange(NamedTuple):
    """One in the program's text: those of a loop's body stand there once, for all `times`."""

    kind: str
    bytes: int  # of what a device has of it in the end
    meanwhile: tuple[str, ...]  # the operations of ours that are begun until it has ended
    times: int = 1  # 0: in a loop whose length the compiler does not know, as further rounds of experts are


def exchanges(program: str) -> list[Exchange]:
    """Of `compiled.as_text()`, whose instructions stand in the order in which they are begun; without those of a
    device with itself alone."""
    found, begun, called = [], {}, _called(program)
    for line in program.splitlines():
        if entered := COMPUTATION.match(line):
            times = math.prod(_lengths(entered[1], called))
        elif match := re.match(rf"\s+(?:ROOT )?%(\S+) = (.*?) ({KINDS})(-start|-done)?\(%?([^,)]*)", line):
            name, result, kind, part, operand = match.groups()
            if part != "-done" and _alone(line):
                continue
            if part == "-start":
                begun[name] = []
            elif part is None or operand in begun:
                found.append(Exchange(kind, _bytes(result), tuple(begun.pop(operand, ())), times))
        elif WORK.search(line):
            name = NAME.search(line)
            for meanwhile in begun.values():
                meanwhile.append(name[1] if name else "")
    return found


def _called(program: str) -> dict[str, tuple[str, int]]:
    """Of loops' bodies and conditions' branches who calls them, and how often."""
    called, caller = {}, ""
    for line in program.splitlines():
        if entered := COMPUTATION.match(line):
            caller = entered[1]
        elif body := re.search(r" while\(.*, body=%([^,\s]+)", line):
            length = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            called[body[1]] = caller, int(length[1]) if length else 0
        elif branches := re.search(r" conditional\(.*, (?:branch_computations=\{|true_computation=)(.*)", line):
            called |= {name: (caller, 1) for name in re.findall(r"%([^,\s}]+)", branches[1].split("metadata=")[0])}
    return called


def _lengths(name: str, called: dict) -> list[int]:
    """Of the loops that a computation is in."""
    lengths = []
    while name in called:
        name, length = called[name]
        lengths.append(length)
    return lengths


def _alone(line: str) -> bool:
    """Whether the groups of an exchange have one device each."""
    if axes := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return all(sizes[axis] == "1" for axis in re.findall(r"'(\w+)'", axes[2]))
    return bool(re.search(r"replica_groups=(\{(\{\d+\},?)+\}|\[\d+,1\])", line))


def _bytes(result: str) -> int:
    """Of arrays as HLO writes them: `(f32[2,3]{1,0}, bf16[])`."""
    return sum(math.prod(int(size) for size in sizes.split(",") if size) * max(1, int(bits or 8) // 8)
               for bits, sizes in re.findall(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]", result))


def summary(program: str) -> str:
    """One line of `exchanges`."""
    every = exchanges(program)
    beside = [each for each in every if each.meanwhile]
    sent, meanwhile = (sum(each.bytes for each in some) for some in (every, beside))
    return (f"{len(beside)} of {len(every)} exchanges, {meanwhile:,} of {sent:,} bytes, go on beside computation "
            "(those of a loop once)")
