"""From an image to what the vision tower reads: tiles of one size, cut from the image, and the whole image once more.

The tiles are those of Meta's chat format, bit for bit: `VariableSizeImageTransform` and `ResizeNormalizeImageTransform` in
llama-models, `llama4/preprocess.py`, as `ChatFormat` in `llama4/chat_format.py` calls them (with `resize_to_max_canvas`
off). In four steps:

1. Colour: to RGB. Only mode RGBA is laid on white; every other mode takes Pillow's `convert("RGB")`, which drops the alpha
   of LA and of palettes and clips 16-bit greys at 255 (they are not scaled down: a bright 16-bit image turns white).
2. Canvas: a grid of at most `max_tiles` tiles. Each grid allows the image one scale, that of its tighter side. Among
   grids that need no shrinking, the least enlargement; else the least shrinking; among equals, the fewest tiles.
3. Resize (Pillow's bilinear filter, which averages when it shrinks), proportions kept. An image may fill the canvas only
   up to its own size or one tile's, whichever is larger: a small image is enlarged to one tile, never to several. It
   lies at the top left, on black.
4. If that makes more than one tile, one more follows: the whole image squeezed into one tile, proportions not kept.

The orientation in EXIF is the loader's matter, as in Transformers (`PIL.ImageOps.exif_transpose`): it is not applied here.

Transformers' `Llama4ImageProcessor` chooses the same grids but makes other pixels (transformers 5.23, torchvision 0.28):

- It resizes tensors with coefficients of fewer bits and normalizes in bfloat16. On 2,500 images of noise no value was more
  than 2.5 of the 255 steps of colour from ours (0.0196): the resize moved 2.4% of the values by one step and 9 values of
  20 million by two, bfloat16 adds up to half a step.
- It works out the size of step 3 in float32. Where the exact side is a whole number, that can round to a pixel more or less
  (377 by 377 onto one tile of 56: 55 by 56), which moves the content: 10 of 12,000 random sizes do.
- It lays every image with any transparency on white.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class ImageTiles:
    """`pixel_values`: float32 [tiles, 3, image_size, image_size] in -1..1; `grid`: (rows, columns) of the canvas.

    The tiles of the canvas come row by row. If there is more than one, the global tile follows as the last.
    """

    pixel_values: Tensor
    grid: tuple[int, int]


class Llama4ImageProcessor:
    """Cuts images into tiles of `image_size` pixels a side, at most `max_tiles` besides the global one."""

    def __init__(self, image_size: int, max_tiles: int = 16) -> None:
        if image_size < 1 or max_tiles < 1:
            raise ValueError(f"image_size ({image_size}) and max_tiles ({max_tiles}) must be at least 1")
        self.image_size = image_size
        self.max_tiles = max_tiles
        # (columns, rows), the order of Pillow's (width, height), which everything inside this class keeps.
        self._grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]

    def __call__(self, image: Image.Image) -> ImageTiles:
        """The tiles of one image, of any size and any mode that Pillow turns into RGB.

        Raises ValueError for an image without pixels and for a mode that cannot be converted (Meta's code fails on both).
        """
        if 0 in image.size:
            raise ValueError(f"an image of {image.width} by {image.height} pixels has nothing to show")
        image = _rgb(image)
        columns, rows = self._best_grid(image.size)
        canvas = Image.new("RGB", (columns * self.image_size, rows * self.image_size), _BLACK)
        canvas.paste(image.resize(self._fitted(image.size, canvas.size), Image.Resampling.BILINEAR))

        size = self.image_size
        tiles = _normalized(canvas).view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4)
        pixel_values = tiles.reshape(rows * columns, 3, size, size)
        if rows * columns > 1:
            whole = _normalized(image.resize((size, size), Image.Resampling.BILINEAR))
            pixel_values = torch.cat([pixel_values, whole[None]])
        return ImageTiles(pixel_values, (rows, columns))

    def _best_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(columns, rows) of the canvas for an image of `size` (width, height).

        Equals are equal in float32, as in Meta's code; a finer comparison would tell scales apart, and so miss the smaller
        of two grids, only where a side has millions of pixels. Two grids of the same scale and the same number of tiles do
        not occur: one would be bound by the image's width, the other by its height, and the grid of just these two sides
        has that scale with fewer tiles.
        """
        sides = torch.tensor(self._grids, dtype=torch.float32) * self.image_size
        scales = (sides / torch.tensor(size, dtype=torch.float32)).amin(dim=1)
        enlarging = scales[scales >= 1]
        best = enlarging.min() if len(enlarging) else scales.max()
        equals = [grid for grid, scale in zip(self._grids, scales, strict=True) if scale == best]
        return min(equals, key=math.prod)

    def _fitted(self, size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
        """(width, height) at which an image of `size` is drawn on the canvas; in double precision, rounded down."""
        # A side is not enlarged beyond one tile, even where the canvas has room.
        width, height = (min(max(side, self.image_size), room) for side, room in zip(size, canvas, strict=True))
        by_width, by_height = width / size[0], height / size[1]
        if by_width < by_height:
            height = min(math.floor(size[1] * by_width), height)
        else:
            width = min(math.floor(size[0] * by_height), width)
        return max(width, 1), max(height, 1)  # a thin image would vanish


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    on_white = Image.new("RGB", image.size, _WHITE)
    on_white.paste(image, mask=image.getchannel("A"))
    return on_white


def _normalized(image: Image.Image) -> Tensor:
    """float32 [3, height, width], 0..255 mapped to -1..1: mean and deviation are 0.5 of full scale."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels.to(torch.float32) / 255 - 0.5) / 0.5
