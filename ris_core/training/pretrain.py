"""A small CLIP of our own: contrastive pre-training on captioned scenes (the embedded default has no other weights).

Reads a captions file in COCO's format, `{"images": [...], "annotations": [{"image_id", "caption", "bbox"?}]}`: captions
without a box describe the whole image, those with one describe that region. Each step encodes some scenes once and
contrasts, with open_clip's own loss (Radford et al. 2021, section 2.3), scenes with their captions and regions with
theirs. A region's feature is cut out of the dense map of the tower (RoIAlign), in the spirit of RegionCLIP (Zhong et al.
2022): the map that CRIS starts from then already answers to words, at the objects' own scale and place. Where single
patches matter, as in RISCLIP, `patch_loss` also contrasts the patches of an image with each other.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ris_core.data.images import load_image
from ris_core.data.letterbox import letterbox_image, letterbox_matrix
from ris_core.data.shapes.wording import LOCATION_WORDS
from ris_core.data.text import encode, pad_token_batch
from ris_core.errors import ConfigError, DataError
from ris_core.models.clip import encode_words, normalise, resnet_feature_maps, vit_patch_map
from ris_core.models.layers import attention_pool_map, position_map
from ris_core.options import option

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from open_clip.modified_resnet import AttentionPool2d

HELD_OUT = 0.1  # share of the captioned images that only measure
RETRIEVAL_AMONG = 128
MEASURED_AT_ONCE = 64  # scenes


@dataclass
class ClipParams:
    """A CLIP that systems start from: the small one, which is trained, or real weights where `weights` is given."""

    architecture: str = "tiny_rn"
    weights: str | None = None
    image_size: int | None = option(None, minimum=16)
    seed: int = 0
    steps: int = option(600, minimum=1)
    scenes_per_step: int = option(24, minimum=2)
    lr: float = option(1e-3, minimum=0)
    weight_decay: float = option(0.05, minimum=0)
    warmup_steps: int = option(30, minimum=0)
    scene_loss: float = option(1.0, minimum=0)  # weight of scenes against their captions
    patch_loss: float = option(0.0, minimum=0)  # weight of an image's patches against each other, for a caption


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
        """Keep only what belongs to these images (pixels are kept whole, indices stay valid)."""
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
    boxes = [_letterboxed(a["bbox"], matrices[i]) for a, i in zip(regions, region_image, strict=True)]
    return Captions(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        scene_image=np.array([place[a["image_id"]] for a in scenes]),
        scene_text=[a["caption"] for a in scenes],
        region_image=region_image,
        region_box=np.array(boxes, np.float32),
        region_text=[a["caption"] for a in regions],
    )


def _letterboxed(bbox: list[float], matrix: np.ndarray) -> list[float]:
    """Give an (x, y, w, h) box of the original image as (x1, y1, x2, y2) in letterboxed pixels."""
    x, y, w, h = bbox
    corners = matrix @ np.array([[x, x + w], [y, y + h], [1.0, 1.0]])
    return [*corners[:, 0], *corners[:, 1]]


def pretrain_clip(clip: CLIP, data: Captions, params: ClipParams, device: torch.device) -> dict[str, float]:
    """Train `clip`, of random weights, in place and return its held-out scores beside chance (see `measure`).

    Deterministic per device.
    """
    from open_clip.loss import ClipLoss
    from open_clip.modified_resnet import ModifiedResNet

    if isinstance(clip.visual, ModifiedResNet):
        begin_local(clip.visual.attnpool)
    order = np.random.default_rng(params.seed).permutation(len(data.pixels))
    held = min(max(RETRIEVAL_AMONG, round(HELD_OUT * len(order))), len(order) // 2)
    training, testing = data.subset(order[held:]), data.subset(order[:held])
    scene_tokens, region_tokens = Tokens(training.scene_text, clip, device), Tokens(training.region_text, clip, device)
    clip.to(device, memory_format=torch.channels_last).train()
    # Few of the 49,408 token vectors occur: sparse gradients spare updating the rest (46 ms a step on two cores).
    clip.token_embedding.sparse = True
    dense = [p for name, p in clip.named_parameters() if name != "token_embedding.weight"]
    groups = [
        {"params": [p for p in dense if p.ndim > 1], "weight_decay": params.weight_decay},
        {"params": [p for p in dense if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=params.lr, betas=(0.9, 0.98), fused=True),
        torch.optim.SparseAdam([clip.token_embedding.weight], lr=params.lr, betas=(0.9, 0.98)),
    ]
    loss_of, side = ClipLoss(), training.pixels.shape[-1]
    shown = torch.zeros((), device=device)
    bar = tqdm(range(params.steps), "pretrain_clip", disable=not sys.stderr.isatty())
    for step in bar:
        warm = min(1.0, (step + 1) / max(1, params.warmup_steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = params.lr * warm * 0.5 * (1 + math.cos(math.pi * step / params.steps))
            optimizer.zero_grad(set_to_none=True)
        scenes, regions = draw(training, params, step)
        views, phrases = encode_scenes(clip, training, scenes, regions), encode_phrases(clip, region_tokens[regions])
        scale = clip.logit_scale.exp()
        loss = loss_of(views.regions, phrases, scale)
        if params.scene_loss:
            said = encode_phrases(clip, scene_tokens[scenes])
            loss = loss + params.scene_loss * loss_of(views.scenes, said, scale)
        if params.patch_loss:
            loss = loss + params.patch_loss * patch_loss(views, phrases, training.region_box[regions] / side, scale)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        shown += loss.detach()
        if (step + 1) % 50 == 0:
            mean, shown = shown.item() / 50, torch.zeros((), device=device)
            bar.set_postfix(loss=f"{mean:.3f}")
            if not sys.stderr.isatty():
                print(f"pretrain_clip step {step + 1}/{params.steps}  loss {mean:.3f}", file=sys.stderr)
    clip.token_embedding.sparse = False
    return measure(clip, testing, device)


@torch.no_grad()
def begin_local(pool: AttentionPool2d) -> None:
    """Let each place of a new attention pool attend to itself first: sine positions, and keys made as queries are.

    At random every place attends to all alike, so that the map is the same everywhere: what lies where is learned late.
    """
    places, width = pool.positional_embedding.shape
    side = math.isqrt(places - 1)
    pool.positional_embedding[1:] = position_map(width, side, side, pool.positional_embedding.device)
    pool.k_proj.load_state_dict(pool.q_proj.state_dict())


def draw(data: Captions, params: ClipParams, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw scene captions and region captions of one step, as indices: a function of (seed, step).

    One caption for each of `scenes_per_step` images, and for each region in them. Captions that are equal, and so would
    count against each other although both are right, occur once.
    """
    random = np.random.default_rng([params.seed, step])
    images = random.choice(
        np.unique(data.scene_image), min(params.scenes_per_step, len(np.unique(data.scene_image))), False
    )
    scenes = random.permutation(np.flatnonzero(np.isin(data.scene_image, images)))
    scenes = scenes[_first(data.scene_image[scenes])]
    scenes = scenes[_first([data.scene_text[i] for i in scenes])]
    regions = random.permutation(np.flatnonzero(np.isin(data.region_image, data.scene_image[scenes])))
    place = np.concatenate([data.region_image[regions, None], data.region_box[regions]], 1)
    regions = regions[np.unique(place, axis=0, return_index=True)[1]]
    return scenes, regions[_first([data.region_text[i] for i in regions])]


def _first(values: np.ndarray | list[str]) -> np.ndarray:
    """Give the positions at which each distinct value occurs first, ascending."""
    return np.sort(np.unique(values, return_index=True)[1])


class Tokens:
    """Captions as token ids; indexing with an array gives a padded batch int64 (N, L) on the device."""

    def __init__(self, texts: list[str], clip: CLIP, device: torch.device):
        self.ids = [encode(text) for text in texts]
        self.context, self.device = int(clip.context_length), device

    def __getitem__(self, chosen: np.ndarray) -> torch.Tensor:
        ids = [self.ids[i] for i in chosen]
        return torch.from_numpy(pad_token_batch(ids, min(self.context, max(map(len, ids))))).to(self.device)


class Views(NamedTuple):
    """What one pass over some images gives, in CLIP's shared space; every vector has unit length."""

    scenes: torch.Tensor  # (B, E) pooled, one for each scene caption
    regions: torch.Tensor  # (R, E) cut out of the map, one for each region caption
    patches: torch.Tensor  # (I, E, h, w) the map of each image
    owner: torch.Tensor  # int64 (R,): the image of each region, as a row of `patches`


def encode_scenes(clip: CLIP, data: Captions, scenes: np.ndarray, regions: np.ndarray) -> Views:
    """Encode scenes and regions in them, from one pass over the images.

    scenes and regions index the captions of `data`; every region must lie in the image of one of the scenes.
    """
    from torchvision.ops import roi_align  # takes a second, and every stage reads this module's options

    device = clip.logit_scale.device
    images, row = np.unique(data.scene_image[scenes], return_inverse=True)
    pooled, patches = dense_map(clip, normalise(data.pixels[images].to(device)))
    owner = torch.from_numpy(np.searchsorted(images, data.region_image[regions])).to(device)
    boxes = torch.cat([owner[:, None].float(), torch.from_numpy(data.region_box[regions]).to(device)], 1)
    scale = patches.shape[-1] / data.pixels.shape[-1]
    cut = roi_align(patches, boxes, 1, scale, sampling_ratio=2, aligned=True).flatten(1)
    seen = pooled[torch.from_numpy(row).to(device)]
    seen, cut, patches = (nn.functional.normalize(features, dim=1) for features in (seen, cut, patches))
    return Views(seen, cut, patches, owner)


def dense_map(clip: CLIP, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give image features (B, E) and the dense map (B, E, h, w) in CLIP's shared space of normalised images (B, 3, S, S).

    A ViT's map holds its projected patch tokens, a ResNet's the attention pool asked at every place. Nothing is
    L2-normalised.

    Raises:
        ConfigError: another kind of visual tower.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(clip.visual, ModifiedResNet):
        layer4 = resnet_feature_maps(clip.visual, images)[2]
        return clip.visual.attnpool(layer4), attention_pool_map(clip.visual.attnpool, layer4)
    if isinstance(clip.visual, VisionTransformer) and clip.visual.attn_pool is None:
        return vit_patch_map(clip.visual, images)
    raise ConfigError(
        f"no dense map of a {type(clip.visual).__name__}: take CLIP's own ResNet or ViT as the visual tower"
    )


def encode_phrases(clip: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Give unit sentence vectors (N, E) of tokens (N, L) as `clip.encode_text` does, for any L up to the context length."""
    return nn.functional.normalize(encode_words(clip, tokens)[1], dim=-1)


def patch_loss(views: Views, phrases: torch.Tensor, boxes: np.ndarray, scale: torch.Tensor) -> torch.Tensor:
    """Give, of a softmax over all patches of an image, -log of the share that a caption (R, E) gives to its region, as a mean.

    boxes (R, 4) are xyxy as shares of the image's side; scale multiplies the cosines. Contrasting regions with each other
    never shows a caption the background, nor asks single patches; here both must give way to the region.
    """
    cells = cells_of(boxes, (views.patches.shape[-2], views.patches.shape[-1])).to(phrases.device)
    cosine = scale * torch.einsum("re,rep->rp", phrases, views.patches.flatten(2)[views.owner])
    return (cosine.logsumexp(1) - cosine.masked_fill(~cells, -math.inf).logsumexp(1)).mean()


def cells_of(boxes: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Tell which cells of a grid (h, w) belong to each box (R, 4), xyxy as shares of the image's side: bool (R, h * w).

    Those whose middle lies inside; for a box too small to hold any, the one under the middle of the box.
    """
    edges = torch.from_numpy(boxes) * torch.tensor([grid[1], grid[0]] * 2)
    inside = []
    for low, high, count in ((edges[:, 1], edges[:, 3], grid[0]), (edges[:, 0], edges[:, 2], grid[1])):
        middles = torch.arange(count) + 0.5
        along = (middles >= low[:, None]) & (middles < high[:, None])
        under = ((low + high) / 2).long().clamp(0, count - 1)
        inside.append(torch.where(along.any(1, keepdim=True), along, nn.functional.one_hot(under, count).bool()))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


@torch.inference_mode()
def measure(clip: CLIP, data: Captions, device: torch.device) -> dict[str, float]:
    """Give held-out scores, each beside its chance level `<name>_chance`. Equal captions in one image are all right.

    Of whole scenes and of regions cut out of the map:
      retrieval@1: a scene picks its caption among 128 (or all, if there are fewer).
      phrase_to_object: a region's caption picks, among the regions of its image, one that carries it.
    Of the map as it is, by its cosine with captions that have no words of place (with all, where each has some):
      patch_accuracy: the best patch of the image lies in a region that carries the caption.
      patch_object: so does, of all regions, the one whose patches have the highest mean.
    """
    clip.eval()
    scenes = np.unique(data.scene_image, return_index=True)[1]
    said = encode_phrases(clip, Tokens(data.scene_text, clip, device)[scenes[:RETRIEVAL_AMONG]])
    region_tokens = Tokens(data.region_text, clip, device)
    attribute = np.array([not LOCATION_WORDS & set(text.lower().split()) for text in data.region_text])
    by_patch = attribute if attribute.any() else ~attribute
    seen: list[torch.Tensor] = []
    found: dict[str, list[float]] = {}
    for part in np.array_split(scenes, -(-len(scenes) // MEASURED_AT_ONCE)):
        regions = np.flatnonzero(np.isin(data.region_image, data.scene_image[part]))
        views = encode_scenes(clip, data, part, regions)
        seen.append(views.scenes)
        for score in _region_scores(data, regions, views, encode_phrases(clip, region_tokens[regions]), by_patch):
            for name, value in score.items():
                found.setdefault(name, []).append(value)
    best = (torch.cat(seen)[:RETRIEVAL_AMONG] @ said.T).argmax(1).cpu().numpy()
    retrieval = {"retrieval@1": float((best == np.arange(len(best))).mean()), "retrieval@1_chance": 1 / len(best)}
    return {**retrieval, **{name: float(np.mean(values)) for name, values in found.items()}}


def _region_scores(
    data: Captions, regions: np.ndarray, views: Views, phrases: torch.Tensor, by_patch: np.ndarray
) -> Iterator[dict[str, float]]:
    """Give each region caption's part of the measures; those of patches where `by_patch` (of all captions) says so."""
    grid = (views.patches.shape[-2], views.patches.shape[-1])
    to_regions = (phrases @ views.regions.T).cpu().numpy()
    to_patches = torch.einsum("re,rep->rp", phrases, views.patches.flatten(2)[views.owner]).cpu().numpy()
    box, image, text = data.region_box[regions], data.region_image[regions], np.array(data.region_text)[regions]
    cells = cells_of(box / data.pixels.shape[-1], grid).numpy()
    for i, caption in enumerate(text):
        same_image = np.flatnonzero(image == image[i])
        objects, first, member = np.unique(box[same_image], axis=0, return_index=True, return_inverse=True)
        right = np.isin(np.arange(len(objects)), member[text[same_image] == caption])
        by_chance = float(right.mean())
        score = {
            "phrase_to_object": float(right[member[to_regions[i, same_image].argmax()]]),
            "phrase_to_object_chance": by_chance,
        }
        if by_patch[regions[i]]:
            of_objects = cells[same_image[first]]
            of_right = np.logical_or.reduce(of_objects[right])
            means = of_objects @ to_patches[i] / of_objects.sum(1)
            score |= {
                "patch_accuracy": float(of_right[to_patches[i].argmax()]),
                "patch_accuracy_chance": float(of_right.mean()),
                "patch_object": float(right[means.argmax()]),
                "patch_object_chance": by_chance,
            }
        yield score
