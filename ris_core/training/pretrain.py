"""A small CLIP of our own: contrastive pre-training on captioned scenes (the embedded default has no other weights).

Reads a captions file in COCO's format, `{"images": [...], "annotations": [{"image_id", "caption", "bbox"?}]}`: captions
without a box describe the whole image, those with one describe that region. Each step contrasts whole scenes among
themselves and regions among themselves with open_clip's own loss (Radford et al. 2021, section 2.3).
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torchvision.ops import roi_align
from tqdm import tqdm

from ris_core.config import ClipParams
from ris_core.data.letterbox import letterbox_image, letterbox_matrix
from ris_core.data.shards import load_image
from ris_core.data.text import encode, pad_token_batch
from ris_core.errors import DataError
from ris_core.models.clip import encode_words, normalise

if TYPE_CHECKING:
    from open_clip.model import CLIP

HELD_OUT = 0.1  # share of the captioned images that only measure
CONTEXT = 1.25  # a region is cut out with this much of its box, so that shapes keep their outline
RETRIEVAL_AMONG = 128


@dataclass
class Captions:
    """Captioned images: pixels uint8 (I, 3, S, S) letterboxed; regions (R, 4) xyxy in letterboxed pixels."""

    pixels: torch.Tensor
    scene_image: np.ndarray
    scene_text: list[str]
    region_image: np.ndarray
    region_box: np.ndarray
    region_text: list[str]

    def subset(self, images: np.ndarray) -> Captions:
        """Only what belongs to these images (pixels are kept whole, indices stay valid)."""
        scenes = np.flatnonzero(np.isin(self.scene_image, images))
        regions = np.flatnonzero(np.isin(self.region_image, images))
        return Captions(
            self.pixels,
            self.scene_image[scenes],
            [self.scene_text[i] for i in scenes],
            self.region_image[regions],
            self.region_box[regions],
            [self.region_text[i] for i in regions],
        )


def read_captions(root: Path, captions: Path, image_size: int) -> Captions:
    """Read a captions file and its images (below `root`). Raises DataError if the file is missing or holds no captions."""
    if not captions.exists():
        raise DataError(
            f"{captions} does not exist: the small CLIP learns from a dataset with captions (see `synthesize`)"
        )
    content = json.loads(captions.read_text())
    folder = root / "images/mscoco/images/train2014"
    place = {image["id"]: i for i, image in enumerate(content["images"])}
    pixels = np.stack([letterbox_image(load_image(folder / i["file_name"]), image_size) for i in content["images"]])
    sizes = {(image["height"], image["width"]) for image in content["images"]}
    affine = {size: letterbox_matrix(*size, image_size)[0] for size in sizes}
    matrices = [affine[image["height"], image["width"]] for image in content["images"]]
    scenes = [a for a in content["annotations"] if "bbox" not in a]
    regions = [a for a in content["annotations"] if "bbox" in a]
    if not scenes or not regions:
        raise DataError(
            f"{captions}: needs captions of whole images and of regions; has {len(scenes)} and {len(regions)}"
        )
    region_image = np.array([place[a["image_id"]] for a in regions])
    boxes = [_to_square(a["bbox"], matrices[i]) for a, i in zip(regions, region_image, strict=True)]
    return Captions(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        scene_image=np.array([place[a["image_id"]] for a in scenes]),
        scene_text=[a["caption"] for a in scenes],
        region_image=region_image,
        region_box=np.array(boxes, np.float32),
        region_text=[a["caption"] for a in regions],
    )


def _to_square(bbox: list[float], matrix: np.ndarray) -> list[float]:
    """An (x, y, w, h) box of the original image as a square-ish (x1, y1, x2, y2) with context, letterboxed."""
    x, y, w, h = bbox
    half = CONTEXT * max(w, h) / 2
    centre = matrix @ np.array([x + w / 2, y + h / 2, 1.0])
    half *= matrix[0, 0]
    return [centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half]


def pretrain_clip(clip: CLIP, data: Captions, params: ClipParams, device: torch.device) -> dict[str, float]:
    """Train `clip` in place and return its held-out scores beside chance (see `measure`). Deterministic per device."""
    from open_clip.loss import ClipLoss

    order = np.random.default_rng(params.seed).permutation(len(data.pixels))
    held = max(RETRIEVAL_AMONG, round(HELD_OUT * len(order)))
    training, testing = data.subset(order[held:]), data.subset(order[:held])
    sampler = Sampler(training, params, clip, device)
    clip.to(device, memory_format=torch.channels_last).train()
    # Few of the 49,408 token vectors occur: sparse gradients spare updating the rest (46 ms a step on two cores).
    clip.token_embedding.sparse = True
    dense = [p for name, p in clip.named_parameters() if name != "token_embedding.weight"]
    groups = [
        {"params": [p for p in dense if p.ndim > 1], "weight_decay": params.weight_decay},
        {"params": [p for p in dense if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=params.lr, betas=(0.9, 0.98), fused=device.type == "cuda"),
        torch.optim.SparseAdam([clip.token_embedding.weight], lr=params.lr, betas=(0.9, 0.98)),
    ]
    loss_of = ClipLoss()
    shown = torch.zeros((), device=device)
    bar = tqdm(range(params.steps), "pretrain_clip", disable=not sys.stderr.isatty())
    for step in bar:
        warm = min(1.0, (step + 1) / max(1, params.warmup_steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = params.lr * warm * 0.5 * (1 + math.cos(math.pi * step / params.steps))
            optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for images, tokens in (sampler.scenes(step), sampler.regions(step)):
            seen, said = clip.encode_image(normalise(images), normalize=True), encode_phrases(clip, tokens)
            loss = loss + loss_of(seen, said, clip.logit_scale.exp())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        shown += loss.detach()
        if (step + 1) % 50 == 0:
            mean, shown = shown.item() / 50, torch.zeros((), device=device)
            bar.set_postfix(loss=f"{mean:.3f}")
            if not sys.stderr.isatty() and (step + 1) % 200 == 0:
                print(f"pretrain_clip step {step + 1}/{params.steps}  loss {mean:.3f}", file=sys.stderr)
    clip.token_embedding.sparse = False
    return measure(clip, testing, params, device)


class Sampler:
    """Batches of one step as a function of (seed, step). Equal captions in one batch would be false negatives: dropped."""

    def __init__(self, data: Captions, params: ClipParams, clip: CLIP, device: torch.device):
        self.data, self.params, self.device = data, params, device
        self.context, self.size = int(clip.context_length), int(clip.visual.image_size)
        self.pixels = data.pixels.to(device)
        self.scene_tokens = [encode(text) for text in data.scene_text]
        self.region_tokens = [encode(text) for text in data.region_text]

    def scenes(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole images uint8 (B, 3, s, s) at the pre-training size, and their tokens (B, L)."""
        chosen = self._draw(step, 0, self.params.scenes_per_step, self.data.scene_text, self.data.scene_image)
        index = torch.from_numpy(self.data.scene_image[chosen]).to(self.device)
        return shrink(self.pixels[index], self.size), self._tokens(self.scene_tokens, chosen)

    def regions(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut-out regions (B, 3, s, s) and their tokens (B, L)."""
        chosen = self._draw(step, 1, self.params.regions_per_step, self.data.region_text, None)
        return self.crops(chosen), self._tokens(self.region_tokens, chosen)

    def crops(self, chosen: np.ndarray) -> torch.Tensor:
        boxes = torch.from_numpy(self.data.region_box[chosen]).to(self.device)
        images, own = np.unique(self.data.region_image[chosen], return_inverse=True)
        rois = torch.cat([torch.from_numpy(own).to(boxes)[:, None], boxes], 1)
        pixels = self.pixels[torch.from_numpy(images).to(self.device)].float()
        return roi_align(pixels, rois, self.size, sampling_ratio=1, aligned=True)

    def _draw(self, step: int, kind: int, count: int, texts: list[str], images: np.ndarray | None) -> np.ndarray:
        random = np.random.default_rng([self.params.seed, step, kind])
        drawn = random.integers(len(texts), size=count)
        _, first = np.unique([texts[i] for i in drawn], return_index=True)
        drawn = drawn[np.sort(first)]
        if images is not None:  # two captions of one image are both right for it
            _, first = np.unique(images[drawn], return_index=True)
            drawn = drawn[np.sort(first)]
        return drawn

    def _tokens(self, tokens: list[list[int]], chosen: np.ndarray) -> torch.Tensor:
        texts = [tokens[i] for i in chosen]
        return torch.from_numpy(pad_token_batch(texts, min(self.context, max(map(len, texts))))).to(self.device)


def encode_phrases(clip: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Unit sentence vectors (N, E) of tokens (N, L); as `clip.encode_text`, which wants the full context length, but shorter."""
    return nn.functional.normalize(encode_words(clip, tokens)[1], dim=-1)


def shrink(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Images (B, 3, S, S) averaged down to (B, 3, size, size) float 0..255; unchanged if they have that size."""
    if pixels.shape[-1] == size:
        return pixels.float()
    return nn.functional.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)


@torch.inference_mode()
def measure(clip: CLIP, data: Captions, params: ClipParams, device: torch.device) -> dict[str, float]:
    """Held-out scores, each with its chance level.

    retrieval@1: the right caption for a scene among 128. phrase_to_object: a region's caption picks a region of the same
    image that carries it (equal captions count as right).
    """
    clip.eval()
    sampler = Sampler(data, params, clip, device)
    first = np.unique(data.scene_image, return_index=True)[1][:RETRIEVAL_AMONG]
    pixels = sampler.pixels[torch.from_numpy(data.scene_image[first]).to(device)]
    seen = clip.encode_image(normalise(shrink(pixels, sampler.size)), normalize=True)
    said = encode_phrases(clip, sampler._tokens(sampler.scene_tokens, first))
    retrieval = ((seen @ said.T).argmax(1).cpu().numpy() == np.arange(len(first))).mean()

    everything = np.arange(len(data.region_text))
    parts = np.array_split(everything, 8)
    regions = torch.cat([clip.encode_image(normalise(sampler.crops(part)), normalize=True) for part in parts])
    phrases = encode_phrases(clip, sampler._tokens(sampler.region_tokens, everything))
    similarity = (phrases @ regions.T).cpu().numpy()
    hits, chance = [], []
    for phrase, text in enumerate(data.region_text):
        same_image = np.flatnonzero(data.region_image == data.region_image[phrase])
        candidates = same_image[np.unique(data.region_box[same_image], axis=0, return_index=True)[1]]
        best = candidates[similarity[phrase, candidates].argmax()]
        box = data.region_box[best]
        right = [r for r in same_image if data.region_text[r] == text]
        hits.append(any((data.region_box[r] == box).all() for r in right))
        chance.append(len({tuple(data.region_box[r]) for r in right}) / len(candidates))
    return {
        "retrieval@1": float(retrieval),
        "retrieval@1_chance": 1 / len(first),
        "phrase_to_object": float(np.mean(hits)),
        "phrase_to_object_chance": float(np.mean(chance)),
    }
