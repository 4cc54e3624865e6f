"""Pictures people look at: masks drawn over images, and galleries of hits and misses."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

PREDICTED = (255, 64, 160)
TRUTH = (0, 230, 118)


def overlay(rgb: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None, scale: int = 1) -> Image.Image:
    """Give the image with the mask tinted and outlined, and the true mask's outline beside it.

    rgb uint8 (H, W, 3); mask and truth bool (H, W). `scale` enlarges small images by whole pixels first.
    """
    pixels = rgb.repeat(scale, 0).repeat(scale, 1).astype(np.float32)
    mask = mask.repeat(scale, 0).repeat(scale, 1)
    tint = np.array(PREDICTED, np.float32)
    pixels[mask] = 0.55 * pixels[mask] + 0.45 * tint
    pixels[outline(mask, max(1, min(rgb.shape[:2]) * scale // 200))] = tint
    if truth is not None:
        edge = outline(truth.repeat(scale, 0).repeat(scale, 1), max(1, min(rgb.shape[:2]) * scale // 200))
        pixels[edge] = np.array(TRUTH, np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def heat(rgb: np.ndarray, probability: np.ndarray, scale: int = 1) -> Image.Image:
    """Draw the image in grey with a map over it: rgb uint8 (H, W, 3), probability float (H, W) relative to its own maximum."""
    grey = rgb.mean(axis=2, keepdims=True).repeat(3, axis=2)
    share = (probability / max(float(probability.max()), 1e-6))[:, :, None]
    pixels = 0.6 * grey * (1 - share) + np.array(PREDICTED, np.float32) * share
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).repeat(scale, 0).repeat(scale, 1))


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Give pixels of the mask within `width` pixels of its border, bool (H, W); the image's own border does not count."""
    inner = mask.astype(bool)
    for _ in range(width):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask.astype(bool) & ~inner


def captioned(picture: Image.Image, text: str, height: int = 18) -> Image.Image:
    """Put the picture on white with one line of text below it, cut to fit."""
    canvas = Image.new("RGB", (picture.width, picture.height + height), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    shown = text
    while text and draw.textlength(shown) > picture.width - 8:
        text = text[:-1]
        shown = text + "…"
    draw.text((4, picture.height + 3), shown, fill="black")
    return canvas


def grid(pictures: list[Image.Image], columns: int, gap: int = 6) -> Image.Image:
    """Put pictures of about one size on a white sheet, row by row."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet
