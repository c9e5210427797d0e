"""Figures as people read them."""

from __future__ import annotations

__all__ = ["percent", "rounded"]


def rounded(value: float, form: str) -> str:
    """`format(value, form)`, without the sign of what is rounded to 0.

    A cosine that float32 takes to 1.0000001 makes a diversity of −0.0000001, which is 0 and no fall below it. (`format` does
    this by itself from Python 3.11 on, where `form` begins with "z".)

    Example:
        >>> rounded(-0.0004, ".2f"), rounded(-0.0004, "+.2f"), rounded(-0.04, ".2f")
        ('0.00', '+0.00', '-0.04')
    """
    text = format(value, form)
    return text if any(digit in text for digit in "123456789") else format(0.0, form)


def percent(share: float) -> str:
    """0.615 → "62%"."""
    return rounded(share, ".0%")
