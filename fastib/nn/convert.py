"""Turns the attention of a ready vision transformer into MHCA."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastib.nn.mhca import MHCA

__all__ = ["apply_mhca"]

_CHILDREN = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
_ARGUMENTS = ("x", "attn_mask", "is_causal")


def apply_mhca(
    model: nn.Module,
    blocks: Iterable[int] = range(8),
    *,
    grid_size: int | tuple[int, int] | None = None,
    num_prefix_tokens: int | None = None,
    rpe_drop: float = 0.1,
    locality_strength: float = 1.0,
    backend: str | None = None,
) -> nn.Module:
    """Replaces `attn` of the given blocks of a timm VisionTransformer (or a model built like one) by MHCA, in place.

    Every weight is kept, as the same parameter under the same name; `alpha` and `center` are new. With alpha = 0 the
    model computes what it did before.

    blocks: indices into `model.blocks`. grid_size, num_prefix_tokens: the model's own where None.
    rpe_drop, locality_strength, backend: see MHCA.

    Returns the model. Raises ValueError, before anything is changed, where a block is missing or its attention holds
    more than a packed qkv and a projection (windows, relative or rotary positions, talking heads), where the grid is
    unknown, and where patches are dropped at random, so that their positions are lost.
    """
    if not isinstance(getattr(model, "blocks", None), (nn.Sequential, nn.ModuleList)):
        raise ValueError(f"apply_mhca: model must have its transformer layers in `blocks`; {_name(model)} does not")
    if not isinstance(blocks, Iterable):
        raise ValueError(f"apply_mhca: blocks must be indices such as range(8), got {blocks!r}")
    if grid_size is None:
        grid_size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if num_prefix_tokens is None:
        num_prefix_tokens = getattr(model, "num_prefix_tokens", None)
    if grid_size is None or num_prefix_tokens is None:
        missing = "grid_size" if grid_size is None else "num_prefix_tokens"
        raise ValueError(f"apply_mhca: {missing} must be given; {_name(model)} does not tell it")
    if getattr(getattr(model, "patch_drop", None), "prob", 0.0) > 0:
        raise ValueError("apply_mhca: model must keep all patches; build it with patch_drop_rate=0")

    options = {"num_prefix_tokens": num_prefix_tokens, "rpe_drop": rpe_drop, "locality_strength": locality_strength}
    converted = {index: _convert(model, index, grid_size, backend=backend, **options) for index in blocks}
    for index, attn in converted.items():
        model.blocks[index].attn = attn
    return model


def _convert(model: nn.Module, index: int, grid_size: int | tuple[int, int], **options: Any) -> MHCA:
    count = len(model.blocks)
    if not 0 <= index < count:
        raise ValueError(f"apply_mhca: blocks must be in 0 ... {count - 1} for {_name(model)}, got {index}")
    attn = getattr(model.blocks[index], "attn", None)
    problem = _why_not(attn)
    if problem is not None:
        raise ValueError(f"apply_mhca: block {index} of {_name(model)} cannot be converted: {problem}")

    # On the meta device nothing is allocated and no random number is drawn for weights that are replaced at once.
    mhca = MHCA(attn.num_heads, attn.num_heads, grid_size, device="meta", **options)
    mhca.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
    mhca.scale = attn.scale
    for name in _CHILDREN:
        if getattr(attn, name, None) is not None:
            setattr(mhca, name, getattr(attn, name))
    weight = attn.qkv.weight
    mhca.alpha = nn.Parameter(torch.empty_like(mhca.alpha, device=weight.device, dtype=weight.dtype))
    mhca.center = nn.Parameter(torch.empty_like(mhca.center, device=weight.device, dtype=weight.dtype))
    mhca.reset_position()
    return mhca.train(attn.training)


def _why_not(attn: nn.Module | None) -> str | None:
    """Why MHCA cannot stand in for this attention; None where it can."""
    if attn is None:
        return "it has no `attn`"
    if isinstance(attn, MHCA):
        return "it is MHCA already"
    if not isinstance(getattr(attn, "qkv", None), nn.Linear) or not isinstance(getattr(attn, "proj", None), nn.Linear):
        return f"{_name(attn)} has no packed `qkv` and `proj`"
    extra = [name for name, _ in attn.named_children() if name not in _CHILDREN]
    extra += [name for name, _ in (*attn.named_parameters(recurse=False), *attn.named_buffers(recurse=False))]
    extra += [name for name in inspect.signature(attn.forward).parameters if name not in _ARGUMENTS]
    if extra:
        return f"{_name(attn)} also has {', '.join(f'`{name}`' for name in extra)}, which MHCA has no place for"
    heads = getattr(attn, "num_heads", None)
    if not isinstance(heads, int) or attn.qkv.out_features % (3 * heads) or not hasattr(attn, "scale"):
        return f"{_name(attn)} has no `num_heads` and `scale` that fit its `qkv`"
    return None


def _name(module: nn.Module) -> str:
    return type(module).__name__
