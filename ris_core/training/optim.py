"""Optimiser and learning-rate schedule. The schedule is a pure function of (epoch, step): it has no state to save."""

from __future__ import annotations

import bisect
import math

import torch
from torch import nn

from ris_core.models.contract import MapSystem, Role
from ris_core.training.params import TrainParams


def make_optimizer(model: MapSystem, params: TrainParams) -> torch.optim.Optimizer:
    """Make Adam or AdamW (betas .9/.999), fused, over what the model trains; each group has a rate by its parameters' role.

    The backbone learns at `backbone_lr_multiplier` times the rate, its positional embeddings with the head or with it.
    AdamW decays only matrices and convolution kernels: biases, norms and scalars sit in groups of their own.
    """
    of_role: dict[Role, list[nn.Parameter]] = {"backbone": [], "positions": [], "head": []}
    for role, parameter in model.trained():
        of_role[role].append(parameter)
    slow, fast = of_role["backbone"], of_role["head"]
    if params.positional_embeddings == "head":
        fast = of_role["positions"] + fast
    else:
        slow = slow + of_role["positions"]
    rates = {"backbone": params.lr * params.backbone_lr_multiplier, "head": params.lr}
    groups = [
        {"name": name, "params": members, "lr": rates[name], "initial_lr": rates[name]}
        for name, members in (("backbone", slow), ("head", fast))
        if members
    ]
    if params.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=params.weight_decay, fused=True)
    split = []
    for group, members in zip(groups, (members for members in (slow, fast) if members), strict=True):
        decayed = [p for p in members if p.ndim > 1]
        others = [p for p in members if p.ndim <= 1]
        split.append({**group, "params": decayed, "weight_decay": params.weight_decay})
        split.append({**group, "params": others, "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in split if group["params"]], fused=True)


def learning_rate_factor(params: TrainParams, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Give what every group's base rate is multiplied with at (0-based) step `step` of (0-based) epoch `epoch`."""
    done = epoch * steps_per_epoch + step
    warm = min(1.0, (done + 1) / params.warmup_steps) if params.warmup_steps else 1.0
    if params.schedule == "multistep":
        # CRIS steps its MultiStepLR after each epoch: milestone 35 lowers the rate from the 36th epoch on.
        return warm * params.gamma ** bisect.bisect_right(params.milestones, epoch)
    if params.schedule == "poly":
        share = epoch / params.epochs if params.poly_each == "epoch" else done / (params.epochs * steps_per_epoch)
        return warm * (1 - share) ** params.poly_power
    return warm * 0.5 * (1 + math.cos(math.pi * done / (params.epochs * steps_per_epoch)))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, params: TrainParams, epoch: int, step: int, steps_per_epoch: int
) -> float:
    """Set each group's rate for this step; returns the head's.

    `first_epoch_backbone_multiplier` reproduces the official CRIS code, whose optimiser starts both groups at the base
    rate and lowers the backbone's only from the second epoch on.
    """
    factor = learning_rate_factor(params, epoch, step, steps_per_epoch)
    for group in optimizer.param_groups:
        base = group["initial_lr"]
        if group["name"] == "backbone" and epoch == 0 and params.first_epoch_backbone_multiplier is not None:
            base = params.lr * params.first_epoch_backbone_multiplier
        group["lr"] = base * factor
    return params.lr * factor
