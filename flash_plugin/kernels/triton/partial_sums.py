"""Sums over all rows in two stages and a fixed order: atomic additions would give other bits each time."""

from __future__ import annotations

import triton

# Enough to keep every multiprocessor of a large GPU busy, few enough for their partial sums to cost next to nothing.
_PROGRAMS = 512


def rows_per_program(rows: int, least: int) -> int:
    """How many consecutive rows one program sums: a power of two, at least ``least``, whatever the device.

    The caller launches ``cdiv(rows, rows_per_program(...))`` programs, each of which writes its own partial sum, and
    adds these up.
    """
    return max(triton.next_power_of_2(triton.cdiv(rows, _PROGRAMS)), least)
