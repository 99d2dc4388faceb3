"""Reads the communication operators, and calls of Python, out of the text of a compiled MindSpore graph."""

from __future__ import annotations

import re
from typing import Iterator, List, Tuple

from pangu_locmoe.parallel.operation import Operation, Shape

_OPERATOR = re.compile(
    r"^\s*%\d+\([^)]*\) = (?:PrimFunc_)?(\w+)\(.* primitive_attrs: \{.*\bgroup: \"([^\"]+)\""
)
_TENSOR = re.compile(r"<Tensor\[(\w+)\], \(([\d, ]*)\)")
_PYTHON = re.compile(r"^\s*%\d+\([^)]*\) = (?:PrimFunc_)?PyExecute\((?:\"([^\"]*)\")?")
_NUMBERS = re.compile(r"\(((?:I64\(\d+\)(?:, )?)+)\)")


def communication(text: str) -> List[Operation]:
    """Every operator of the graph that has a group, in order.

    Their direction is empty: not every operator's scope tells it.

    Raises:
        ValueError: an operator whose shapes cannot be read.
    """
    lines = text.splitlines()
    return [_operation(lines, index, *match.groups()) for index, match in _matches(lines)]


def host_python(text: str) -> List[str]:
    """What the graph has Python compute on the host, an expression for each node.

    Such a node cuts the graph in parts: the host waits for the device, and the device for it.
    """
    matches = (_PYTHON.match(line) for line in text.splitlines())
    return [match[1] or "an expression" for match in matches if match]


def _matches(lines: List[str]) -> Iterator[Tuple[int, re.Match[str]]]:
    for index, line in enumerate(lines):
        match = _OPERATOR.match(line)
        if match:
            yield index, match


def _operation(lines: List[str], index: int, kind: str, group: str) -> Operation:
    operand, arrow, result = lines[index + 1].partition(" -> ")
    tensors = _TENSOR.findall(operand)
    results = _TENSOR.findall(result)
    if not (arrow and tensors and results):
        raise ValueError(
            f"line {index + 2} of the graph has no shapes for {kind}: "
            f"{lines[index + 1].strip()[:200]}"
        )
    sent: Tuple[int, ...] = ()
    if kind == "AlltoAllV":
        # The first of two tuples of constants; an operand that is not constant would leave fewer.
        counts = _NUMBERS.findall(lines[index].partition(" primitive_attrs:")[0])
        sent = (
            tuple(int(number) for number in re.findall(r"I64\((\d+)\)", counts[0]))
            if len(counts) == 2
            else ()
        )
    return Operation(
        kind, group, "", tensors[0][0], _shape(tensors[0][1]), _shape(results[0][1]), sent
    )


def _shape(text: str) -> Shape:
    return tuple(int(number) for number in text.replace(" ", "").split(",") if number)
