"""The one letterbox: CRIS' resampling of images, masks and predictions, without OpenCV.

CRIS (DerrickWang005/CRIS.pytorch, `utils/dataset.py`) fits an image into a square by `cv2.warpAffine` with a matrix
solved from three float32 corner points. The affine maps pixel *index* (x, y) to (s*x + bx, s*y + by): there is no
half-pixel shift, so it is not a resize followed by padding. Images are cubic (A = -0.75) on a border of the CLIP mean
colour, masks bilinear on black. OpenCV 4 rounds source coordinates to 1/32 pixel and OpenCV 5 does not; published
numbers come from OpenCV 4, which therefore is the default.

There is no rotation, so every resampling here is separable: one short weighted sum along the rows, one along the
columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cachetools import LRUCache, cached

from ris_core.errors import ConfigError, DataError

BORDER_RGB = (123, 117, 104)  # the CLIP mean (122.77, 116.74, 104.09) as OpenCV rounds it into a uint8 image
CUBIC_A = -0.75
STRIP = 160  # pixels: a quarter of a usual photo's width
BAND = 64  # outputs of a step of `unletterbox` on a CPU: measured, at 640x480 from 104x104 it saves three quarters

Mode = Literal["opencv4", "exact"]
Kernel = Literal["linear", "cubic"]
Upsampling = Literal["grid", "corners"]


def letterbox_matrix(height: int, width: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Give the affine image -> square of `size` pixels, and the affine back: two (2, 3) float64 matrices on (x, y, 1).

    Both are solved, separately, from three corner points rounded to float32, as the official code does; that moves
    entries by up to 1.5e-6 against the exact scale and bias, and is reproduced to the last bit.
    """
    if min(height, width, size) < 1:
        raise DataError(f"cannot letterbox an image of {height}x{width} pixels into {size}: sizes must be positive")
    scale = min(size / height, size / width)
    new_height, new_width = height * scale, width * scale
    left, top = (size - new_width) / 2, (size - new_height) / 2
    image = np.array([(0, 0), (width, 0), (0, height)], np.float32)
    square = np.array([(left, top), (left + new_width, top), (left, top + new_height)], np.float32)
    return _affine_from_points(image, square), _affine_from_points(square, image)


def letterbox_image(rgb: np.ndarray, size: int, mode: Mode = "opencv4") -> np.ndarray:
    """Put an RGB image (H, W, 3) uint8 in a square (size, size, 3) uint8: cubic, border `BORDER_RGB`.

    Values are within one level of OpenCV's fixed-point arithmetic (a few in 100,000 differ). An image that already is
    size x size comes back as a copy. About 2 ms for 640x480 -> 416 on one core.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise DataError(f"expected an RGB image (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    if rgb.shape[:2] == (size, size):
        return np.array(rgb, order="C")
    taps = _forward_taps(rgb.shape[0], rgb.shape[1], size, 1, "cubic", mode)
    return _warp(_used(rgb, *taps), *taps, size, BORDER_RGB)


def letterbox_mask(mask: np.ndarray, size: int, stride: int = 1, mode: Mode = "opencv4") -> np.ndarray:
    """Put a mask (H, W), nonzero = object, in the square seen at every `stride`-th pixel: (size/stride, size/stride) uint8.

    Levels run from 0 to 255 and are soft at edges: divide by 255 for the training target. Warping straight to the
    coarse grid equals warping to `size` and taking every `stride`-th row and column ('nearest', as CRIS does), bit for
    bit.
    """
    return np.ascontiguousarray(letterbox_masks([mask], size, stride, mode)[0])


def letterbox_masks(masks: Sequence[np.ndarray], size: int, stride: int = 1, mode: Mode = "opencv4") -> np.ndarray:
    """Put masks of one size as `letterbox_mask` does, at once, which is faster: (N, size/stride, size/stride) uint8.

    Raises DataError for what is no mask or is of another size, ConfigError for a stride that does not divide `size`.
    """
    if size % stride:
        raise ConfigError(f"mask stride {stride} does not divide the letterbox size {size}")
    side = size // stride
    if not masks:
        return np.empty((0, side, side), np.uint8)
    shapes = {mask.shape for mask in masks}
    if len(shapes) > 1 or len(masks[0].shape) != 2:
        raise DataError(f"expected a mask (H, W), got shape {', '.join(map(str, sorted(shapes)))}")
    height, width = masks[0].shape
    if (height, width) == (size, size):
        return np.stack([_levels(mask[::stride, ::stride]) for mask in masks])
    taps = _forward_taps(height, width, size, stride, "linear", mode)
    seen = np.stack([_levels(_used(mask, *taps)) for mask in masks], axis=-1)
    return _warp(seen, *taps, side, (0,) * len(masks)).transpose(2, 0, 1)


def unletterbox(
    probabilities: torch.Tensor,
    height: int,
    width: int,
    size: int,
    mode: Mode = "opencv4",
    upsampling: Upsampling = "corners",
) -> torch.Tensor:
    """Bring maps (N, h, w) on the letterbox square to float32 (N, height, width) on the original image, on the same device.

    The map is upsampled to `size` (bicubic) and warped back (cubic, border 0). Both steps are linear and separable, so
    they are two small matrices here: rows @ map @ columns^T. Values overshoot [0, 1] a little; threshold with `>`. No
    gradient flows back.

    `upsampling` says where cell i of the map lies. "corners" is CRIS' (align_corners=True): cell i at pixel
    i * (size - 1) / (h - 1). But its target was sampled at pixel i * size / h, so that masks come out stretched, by 3
    pixels at the far edges for a stride of 4: nothing at 416 pixels, a lot at 128. "grid" puts cells where they were sampled.
    """
    if probabilities.ndim != 3 or not probabilities.is_floating_point():
        raise DataError(f"expected float maps (N, h, w), got {tuple(probabilities.shape)} {probabilities.dtype}")
    grid = (probabilities.shape[1], probabilities.shape[2])
    rows, columns = _inverse_matrices(height, width, size, grid, mode, upsampling, probabilities.device)
    maps = probabilities.detach().float()
    with torch.autocast(maps.device.type, enabled=False):
        if height * grid[1] <= width * grid[0]:
            return _across(_down(maps, height, rows), width, columns)
        return _down(_across(maps, width, columns), height, rows)


class _Taps(NamedTuple):
    """Which source samples make up the outputs first..last-1, and with what weight. Outputs outside are pure border."""

    first: int
    last: int
    used: np.ndarray  # int64 (k,): which source samples are looked at, ascending
    source: torch.Tensor  # (n, taps) int64, places in `used`; the value k stands for the border
    weight: torch.Tensor  # (n, taps) float32


class _Band(NamedTuple):
    """What the outputs first..last-1 along an axis are made of: `weight` (last - first, n) of the inputs start..start+n-1."""

    first: int
    last: int
    start: int
    weight: torch.Tensor  # float32

    @property
    def sources(self) -> slice:
        return slice(self.start, self.start + self.weight.shape[1])


def _taps_nbytes(found: Iterable[_Taps]) -> int:
    """Tell what a cached result holds: sizes of photos are endless, so that no cache is bounded by their number."""
    return sum(each.used.nbytes + each.source.nbytes + each.weight.nbytes for each in found)


def _bands_nbytes(found: Iterable[list[_Band]]) -> int:
    return sum(band.weight.nbytes for bands in found for band in bands)


def _affine_from_points(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Give the affine (2, 3) float64 that maps three points (3, 2) onto three others.

    Gaussian elimination with row pivoting, written out, because its order of operations is OpenCV's: LAPACK's differs
    in the last bits.
    """
    system = np.zeros((6, 7))
    for point, (x, y) in enumerate(source.astype(np.float64)):
        system[2 * point, :3] = system[2 * point + 1, 3:6] = x, y, 1
        system[2 * point : 2 * point + 2, 6] = target[point]
    for column in range(6):
        pivot = column + int(np.argmax(np.abs(system[column:, column])))
        system[[column, pivot]] = system[[pivot, column]]
        for row in range(column + 1, 6):
            factor = system[row, column] * (-1 / system[column, column])
            system[row, column + 1 :] += factor * system[column, column + 1 :]
    solution = system[:, 6].copy()
    for row in reversed(range(6)):
        for column in range(row + 1, 6):
            solution[row] -= system[row, column] * solution[column]
        solution[row] /= system[row, row]
    return solution.reshape(2, 3)


def _source_lines(matrix: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Give (slope, offset) of the source coordinate per output index, for y and x, inverted the way warpAffine does."""
    determinant = 1 / (matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0])
    slope_x, slope_y = matrix[1, 1] * determinant, matrix[0, 0] * determinant
    return (slope_y, -slope_y * matrix[1, 2]), (slope_x, -slope_x * matrix[0, 2])


def _taps(line: tuple[float, float], n_out: int, stride: int, n_source: int, kernel: Kernel, mode: Mode) -> _Taps:
    """Give the weighted source samples of every `stride`-th of the outputs 0..n_out*stride-1 along one axis."""
    slope, offset = line
    outputs = np.arange(n_out) * stride
    if mode == "opencv4":  # OpenCV 4: both terms rounded to 1/1024, their sum to 1/32 pixel
        ticks = (np.rint(slope * outputs * 1024) + np.rint(offset * 1024) + 16).astype(np.int64) >> 5
        base, fraction = ticks >> 5, (ticks & 31) / 32
    else:
        position = slope * outputs + offset
        base = np.floor(position).astype(np.int64)
        fraction = position - base
    weight = np.stack([1 - fraction, fraction], 1) if kernel == "linear" else _cubic_weights(fraction)
    before = 0 if kernel == "linear" else 1
    index = base[:, None] + np.arange(weight.shape[1]) - before
    inside = (index >= 0) & (index < n_source)
    touched = np.flatnonzero((inside & (weight != 0)).any(axis=1))
    first, last = (int(touched[0]), int(touched[-1]) + 1) if touched.size else (0, 0)
    inside, index = inside[first:last], index[first:last]
    used = np.unique(index[inside])
    source = np.where(inside, np.searchsorted(used, index), len(used))
    return _Taps(first, last, used, torch.from_numpy(source), torch.from_numpy(weight[first:last]).float())


def _cubic_weights(fraction: np.ndarray) -> np.ndarray:
    """Give weights (n, 4) of samples at -1, 0, 1, 2 around each fraction: Keys' cubic convolution with A = -0.75."""

    def near(t: np.ndarray) -> np.ndarray:
        return ((CUBIC_A + 2) * t - (CUBIC_A + 3)) * t * t + 1

    def far(t: np.ndarray) -> np.ndarray:
        return ((CUBIC_A * t - 5 * CUBIC_A) * t + 8 * CUBIC_A) * t - 4 * CUBIC_A

    weights = np.stack([far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)], 1)
    weights[:, 3] = 1 - weights[:, :3].sum(axis=1)
    return weights


@cached(LRUCache(32 * 2**20, _taps_nbytes), lock=Lock())
def _forward_taps(height: int, width: int, size: int, stride: int, kernel: Kernel, mode: Mode) -> tuple[_Taps, _Taps]:
    line_y, line_x = _source_lines(letterbox_matrix(height, width, size)[0])
    rows = _taps(line_y, size // stride, stride, height, kernel, mode)
    columns = _taps(line_x, size // stride, stride, width, kernel, mode)
    return rows, columns


def _used(pixels: np.ndarray, rows: _Taps, columns: _Taps) -> np.ndarray:
    """Give of pixels (H, W, ...) the rows and columns that are looked at: a target needs few of a mask's."""
    if pixels.shape[:2] == (len(rows.used), len(columns.used)):
        return pixels
    return pixels[np.ix_(rows.used, columns.used)]


def _levels(mask: np.ndarray) -> np.ndarray:
    return (mask != 0).astype(np.uint8) * np.uint8(255)


def _warp(pixels: np.ndarray, rows: _Taps, columns: _Taps, side: int, border: tuple[int, ...]) -> np.ndarray:
    """Warp pixels (h, w, C) uint8, those that the taps look at -> (side, side, C) uint8.

    `embedding_bag` is torch's weighted sum of gathered rows, vectorised and without a temporary per tap: the vertical
    pass gathers image rows, the horizontal pass gathers columns after a transpose. One extra row and one extra column
    hold the border colour, and taps outside the image point there. Output that is pure border is never computed. The
    vertical pass goes from strip to strip: what it holds then stays in the cache, and is no new memory every time.
    """
    height, width, channels = pixels.shape
    colour = torch.tensor(border, dtype=torch.float32)
    tall, wide = len(rows.source), len(columns.source)
    upright = torch.empty(width + 1, tall, channels)
    upright[width] = colour
    for left in range(0, width, STRIP):
        across = min(STRIP, width - left)
        if not left or across < STRIP:
            source = torch.empty(height + 1, across * channels)
            source[height] = colour.repeat(across)
        source.numpy()[:height].reshape(height, across, channels)[:] = pixels[:, left : left + across]
        lines = F.embedding_bag(rows.source, source, mode="sum", per_sample_weights=rows.weight)
        upright[left : left + across] = lines.view(tall, across, channels).transpose(0, 1)
    inner = F.embedding_bag(columns.source, upright.view(width + 1, -1), mode="sum", per_sample_weights=columns.weight)
    inner = inner.add_(0.5).clamp_(0, 255)  # rounds half up, as fixed-point arithmetic does
    levels = torch.from_numpy(inner.numpy().astype(np.uint8))  # a quarter of torch's time

    out = _canvas(side, border).clone()
    out[rows.first : rows.last, columns.first : columns.last] = levels.view(wide, tall, channels).transpose(0, 1)
    return out.numpy()


@lru_cache(maxsize=16)
def _canvas(side: int, border: tuple[int, ...]) -> torch.Tensor:
    """Make a square of border colour, to be cloned: copying is much faster than filling three bytes at a time."""
    return torch.tensor(border, dtype=torch.uint8).expand(side, side, len(border)).contiguous()


@cached(LRUCache(64 * 2**20, _bands_nbytes), lock=Lock())
def _inverse_matrices(
    height: int, width: int, size: int, grid: tuple[int, int], mode: Mode, upsampling: Upsampling, device: torch.device
) -> tuple[list[_Band], list[_Band]]:
    """Give the way from a (h, w) grid over the square to the original pixels: bands of (height, h) and of (width, w)."""
    line_y, line_x = _source_lines(letterbox_matrix(height, width, size)[1])
    rows = _inverse_matrix(
        _taps(line_y, height, 1, size, "cubic", mode), height, _upsampling(grid[0], size, upsampling)
    )
    columns = _inverse_matrix(
        _taps(line_x, width, 1, size, "cubic", mode), width, _upsampling(grid[1], size, upsampling)
    )
    return _bands(rows.float(), device), _bands(columns.float(), device)


def _bands(matrix: torch.Tensor, device: torch.device) -> list[_Band]:
    """Cut a matrix whose rows have few neighbouring weights into bands without most of its zeros, on a device.

    A GPU is given all of it: there, more launches cost more than more zeros.
    """
    height = BAND if device.type == "cpu" else len(matrix)
    bands = []
    for first in range(0, len(matrix), height):
        part = matrix[first : first + height]
        used = part.any(dim=0).nonzero().flatten().tolist() or [0]
        weight = part[:, used[0] : used[-1] + 1].contiguous().to(device)
        bands.append(_Band(first, first + len(part), used[0], weight))
    return bands


def _down(maps: torch.Tensor, height: int, bands: list[_Band]) -> torch.Tensor:
    """Give matrix @ map of every map (N, h, w): (N, height, w)."""
    out = maps.new_empty(len(maps), height, maps.shape[2])
    for band in bands:
        torch.matmul(band.weight, maps[:, band.sources], out=out[:, band.first : band.last])
    return out


def _across(maps: torch.Tensor, width: int, bands: list[_Band]) -> torch.Tensor:
    """Give map @ matrix^T of every map (N, h, w): (N, h, width)."""
    count, height, _ = maps.shape
    lines = maps.flatten(0, 1)
    out = maps.new_empty(count * height, width)
    for band in bands:
        torch.mm(lines[:, band.sources], band.weight.T, out=out[:, band.first : band.last])
    return out.view(count, height, width)


def _inverse_matrix(taps: _Taps, n_out: int, upsampling: torch.Tensor) -> torch.Tensor:
    """Apply the taps to the rows of an upsampling matrix (n_source + 1, n): float64 (n_out, n)."""
    matrix = torch.zeros(n_out, upsampling.shape[1], dtype=torch.float64)
    place = torch.from_numpy(np.append(taps.used, len(upsampling) - 1))[taps.source]
    matrix[taps.first : taps.last] = (taps.weight[:, :, None] * upsampling[place]).sum(dim=1)
    return matrix


@lru_cache(maxsize=32)
def _upsampling(n_source: int, n_out: int, upsampling: Upsampling) -> torch.Tensor:
    """Give bicubic upsampling along one axis: float64 (n_out + 1, n_source), last row 0 (border)."""
    if upsampling == "corners":
        identity = torch.eye(n_source, dtype=torch.float64)[None, None]
        matrix = F.interpolate(identity, (n_out, n_source), mode="bicubic", align_corners=True)[0, 0]
    else:
        position = np.arange(n_out) * (n_source / n_out)
        base = np.floor(position).astype(np.int64)
        index = np.clip(base[:, None] + np.arange(-1, 3), 0, n_source - 1)
        weights = torch.from_numpy(_cubic_weights(position - base))
        matrix = torch.zeros(n_out, n_source, dtype=torch.float64).scatter_add_(1, torch.from_numpy(index), weights)
    return F.pad(matrix, (0, 0, 0, 1))
