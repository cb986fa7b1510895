"""The colours of heat maps, computed."""

from __future__ import annotations

import math

LEVELS = 16


def ramp(dark: bool) -> list[str]:
    """The colours q0 to q15, "#rrggbb": even steps of lightness (OKLCH), so that order survives colour blindness and grey print.

    The smallest value is nearest to the page, the largest stands out most: yellow to navy on light, navy to yellow on dark.
    """
    colors = []
    for i in range(LEVELS):
        part = i / (LEVELS - 1)
        part = 1 - part if dark else part
        lightness, chroma, hue = (
            0.93 - 0.63 * part,
            0.05 + 0.075 * math.sin(math.pi * part * 0.8),
            math.radians(108 + 165 * part),
        )
        colors.append(_srgb(lightness, chroma * math.cos(hue), chroma * math.sin(hue)))
    return colors


def _srgb(lightness: float, a: float, b: float) -> str:
    """A colour of OKLab (Björn Ottosson, "A perceptual color space for image processing", 2020), clipped to sRGB."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    channels = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear)
    return "#" + "".join(f"{round(255 * min(max(c, 0), 1)):02x}" for c in channels)
