"""What happens to an image between its file and its patches, as in DeiT, with Pillow alone.

Training: a crop of random area and aspect to S x S, bicubic; mirrored half of the time; two operations of RandAugment at magnitude 9
(deviation 0.5, applied half of the time each); normalised; a quarter of the images lose a random rectangle to noise. Else: shorter side to
S / 0.875, centre crop, normalised. Touvron et al. 2021, https://arxiv.org/abs/2012.12877; Cubuk et al. 2019,
https://arxiv.org/abs/1909.13719; Zhong et al. 2017, https://arxiv.org/abs/1708.04896.

Departures: no colour jitter, which timm leaves out too where RandAugment is on, and one interpolation, where timm draws bilinear or bicubic
for the operations that move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

if TYPE_CHECKING:
    from collections.abc import Callable

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
"""of ImageNet, for each of red, green and blue"""
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
CROP = 0.875
"""side of the centre crop over the shorter side"""
_AREA, _ASPECT, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
_OPERATIONS, _MAGNITUDE, _SPREAD, _APPLIED = 2, 9.0, 0.5, 0.5
_ERASED, _ERASED_AREA, _ERASED_ASPECT = 0.25, (0.02, 1 / 3), (0.3, 1 / 0.3)
_GREY = (124, 116, 104)


def for_training(image: Image.Image, side: int, rng: np.random.Generator) -> np.ndarray:
    """An augmented image `[3, S, S]` in float32."""
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=_crop(image.size, rng))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for choice in rng.integers(0, len(OPERATIONS), _OPERATIONS):
        strength = float(np.clip(rng.normal(_MAGNITUDE, _SPREAD), 0, 10)) / 10
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < _APPLIED:
            image = list(OPERATIONS.values())[choice](image, strength, sign)
    return _erased(_normalised(image), rng)


def for_evaluation(image: Image.Image, side: int) -> np.ndarray:
    """The middle of an image, `[3, S, S]` in float32."""
    width, height = image.size
    cut = min(width, height) * CROP
    left, top = (width - cut) / 2, (height - cut) / 2
    return _normalised(image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + cut, top + cut)))


def _normalised(image: Image.Image) -> np.ndarray:
    values: np.ndarray = (np.asarray(image, np.float32) / 255 - MEAN) / DEVIATION
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _crop(size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box of random area and aspect, or the largest centred one of an allowed aspect where none of ten fits."""
    width, height = size
    for _ in range(_TRIES):
        w, h = _box(width * height, _AREA, _ASPECT, rng)
        if 1 <= w <= width and 1 <= h <= height:
            left, top = rng.random() * (width - w), rng.random() * (height - h)
            return left, top, left + w, top + h
    w, h = min(width, height * _ASPECT[1]), min(height, width / _ASPECT[0])
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _box(area: float, share: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator) -> tuple[float, float]:
    """Width and height, uniform in area and in the logarithm of the aspect."""
    area *= rng.uniform(*share)
    ratio = np.exp(rng.uniform(*np.log(aspect)))
    return float((area * ratio) ** 0.5), float((area / ratio) ** 0.5)


def _erased(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = image.shape[1]
    if rng.random() < _ERASED:
        w, h = (min(round(x), side) for x in _box(side**2, _ERASED_AREA, _ERASED_ASPECT, rng))
        left, top = rng.integers(0, side - w + 1), rng.integers(0, side - h + 1)
        image[:, top : top + h, left : left + w] = rng.normal(size=(3, h, w))
    return image


def _moved(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_GREY)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "autocontrast": lambda x, _s, _d: ImageOps.autocontrast(x),
    "equalize": lambda x, _s, _d: ImageOps.equalize(x),
    "invert": lambda x, _s, _d: ImageOps.invert(x),
    "rotate": lambda x, s, d: x.rotate(30 * s * d, Image.Resampling.BICUBIC, fillcolor=_GREY),
    "posterize": lambda x, s, _d: ImageOps.posterize(x, max(1, 4 - int(4 * s))),
    "solarize": lambda x, s, _d: ImageOps.solarize(x, 256 - int(256 * s)),
    "solarize_add": lambda x, s, _d: x.point([v + int(110 * s) if v < 128 else v for v in range(256)] * 3),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda x, s, d: _moved(x, 1, 0.3 * s * d, 0, 0, 1, 0),
    "shear_y": lambda x, s, d: _moved(x, 1, 0, 0, 0.3 * s * d, 1, 0),
    "translate_x": lambda x, s, d: _moved(x, 1, 0, 0.45 * s * d * x.size[0], 0, 1, 0),
    "translate_y": lambda x, s, d: _moved(x, 1, 0, 0, 0, 1, 0.45 * s * d * x.size[1]),
}
"""Name -> operation on (image, strength in [0, 1], direction +1 or -1)."""
