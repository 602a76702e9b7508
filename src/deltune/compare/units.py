"""Numbers for people."""

from __future__ import annotations

from deltune.measure import Spread

__all__ = ["count", "duration", "quality", "quality_number", "share", "size"]

#: Metrics that are shares of something and read best in per cent.
_PERCENTAGES = ("accuracy", "macro_f1", "f1")


def count(value: float) -> str:
    """A number of values, to three digits: ``912``, ``73.7 K``, ``22.7 M``."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if value >= limit * 0.9995:
            return f"{_three_digits(value / limit)}{unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes in powers of ten, to three digits: ``295 kB``, ``90.9 MB``."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit * 0.9995:
            return f"{_three_digits(value / limit)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """A time: ``4.2 s``, ``48 s``, ``3 min 20 s``, ``1 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def share(value: float) -> str:
    """A share of the model in per cent, to two digits: ``0.33 %``."""
    percent = value * 100
    if percent == 0:
        return "0 %"
    return f"{percent:.{max(0, 1 - _exponent(percent))}f} %" if percent < 10 else f"{percent:.0f} %"


def quality_number(metric: str, value: float) -> str:
    """A value of a metric without its unit: ``84.3`` per cent of accuracy, ``0.712`` of a correlation."""
    return f"{value * 100:.1f}" if metric in _PERCENTAGES else f"{value:.3f}"


def quality(metric: str, spread: Spread) -> str:
    """Mean and standard deviation of a metric: ``84.3 ± 0.6 %``."""
    text = quality_number(metric, spread.mean)
    if spread.deviation is not None:
        text += f" ± {quality_number(metric, spread.deviation)}"
    return f"{text} %" if metric in _PERCENTAGES else text


def percentage(metric: str) -> bool:
    """Whether a metric is shown in per cent."""
    return metric in _PERCENTAGES


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _exponent(value: float) -> int:
    exponent = 0
    while value < 1:
        value *= 10
        exponent -= 1
    while value >= 10:
        value /= 10
        exponent += 1
    return exponent
