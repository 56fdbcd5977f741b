"""Paths over tokens for :func:`effvlm.selective_scan`: index arithmetic in place of permuted copies.

A traversal is ``(outer_count, inner_count, offset, outer_stride, inner_stride)``: step ``t`` is at place
``offset + t // inner_count * outer_stride + t % inner_count * inner_stride`` of the sequence.
"""

from __future__ import annotations

Traversal = tuple[int, int, int, int, int]


def rows(height: int, width: int, offset: int = 0) -> Traversal:
    """A map stored row by row from place ``offset`` on, in that order."""
    return height, width, offset, width, 1


def columns(height: int, width: int, offset: int = 0) -> Traversal:
    """The same map, column by column."""
    return width, height, offset, 1, width


def backward(traversal: Traversal) -> Traversal:
    """The same places, last first."""
    outer, inner, offset, outer_stride, inner_stride = traversal
    last = offset + (outer - 1) * outer_stride + (inner - 1) * inner_stride
    return outer, inner, last if outer and inner else offset, -outer_stride, -inner_stride


def bidirectional(length: int) -> tuple[Traversal, ...]:
    """Forward and backward, as Vim scans."""
    forward = (1, length, 0, 0, 1)
    return forward, backward(forward)


def cross_scan(height: int, width: int, offset: int = 0) -> tuple[Traversal, ...]:
    """By rows, by columns, and both backward: VMamba's four, in its order, over a map stored row by row from ``offset`` on."""
    by_rows, by_columns = rows(height, width, offset), columns(height, width, offset)
    return by_rows, by_columns, backward(by_rows), backward(by_columns)


def multi_scale_scan(height: int, width: int, low_height: int, low_width: int) -> tuple[Traversal, ...]:
    """By rows over a map, and the other three ways of :func:`cross_scan` over a smaller one stored behind it, as MSVMamba."""
    return rows(height, width), *cross_scan(low_height, low_width, height * width)[1:]
