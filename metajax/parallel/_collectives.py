"""Communication of a compiled program."""

from __future__ import annotations

import math
import re

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf"= (?P<result>\(.*?\)|\S+) (?P<kind>{'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+\d+)(?:[a-z0-9]*)\[(?P<shape>[\d,]*)\]")


def collective_bytes(text: str) -> dict[str, int]:
    """Counts the bytes that each kind of collective of a compiled program returns on one device.

    A collective inside a loop counts once. The meta step has no collectives in loops unless the compiler divides the
    computation of a task (`model`).

    Args:
      text: program text, from `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      The kinds that occur ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute") and their
      bytes.

    >>> collective_bytes("  %sum = (f32[8]{0}, f32[]) all-reduce(%a, %b), channel_id=1")
    {'all-reduce': 36}
    """
    found: dict[str, int] = {}
    for line in text.splitlines():
        call = _CALL.search(line)
        if call:
            arrays = [(array["type"], array["shape"]) for array in _ARRAY.finditer(call["result"])]
            if "-start(" in line and call["kind"] != "all-reduce":  # asynchronous collectives list their operands too
                arrays = arrays[len(arrays) // 2 :]
            size = sum(_width(kind) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)
            found[call["kind"]] = found.get(call["kind"], 0) + size
    return found


def _width(kind: str) -> int:
    digits = re.sub(r"\D", "", kind)
    return 1 if kind == "pred" or not digits else max(int(digits) // 8, 1)
