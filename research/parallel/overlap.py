"""What a compiled program for GPUs exchanges, and what it computes meanwhile: read off the text of its schedule."""

import math
import re
from typing import NamedTuple

KINDS = r"all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
WORK = re.compile(r" (?:fusion|custom-call|dot|convolution|sort|scatter|while|conditional|call)\(")
NAME = re.compile(r'op_name="([^"]*)"')


class Exchange(NamedTuple):
    """One in the program's text: those of a loop's body stand there once."""

    kind: str
    bytes: int  # of what a device has of it in the end
    meanwhile: tuple[str, ...]  # the operations of ours that are begun until it has ended


def exchanges(program: str) -> list[Exchange]:
    """Of `compiled.as_text()`, whose instructions stand in the order in which they are begun."""
    found, begun = [], {}
    for line in program.splitlines():
        if match := re.match(rf"\s+(?:ROOT )?%(\S+) = (.*?) ({KINDS})(-start|-done)?\(%?([^,)]*)", line):
            name, result, kind, part, operand = match.groups()
            if part == "-start":
                begun[name] = []
            else:
                meanwhile = tuple(begun.pop(operand, ()))
                found.append(Exchange(kind, _bytes(result), meanwhile))
        elif WORK.search(line):
            name = NAME.search(line)
            for meanwhile in begun.values():
                meanwhile.append(name[1] if name else "")
    return found


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
