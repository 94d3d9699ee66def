"""The class token's attention maps of a vision transformer whose fused attention stays on (AAL, Eq. 3)."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from fastib.nn.head_token_attention import HeadTokenAttention
from fastib.nn.mhca import MHCA
from fastib.ops import cls_attention_maps
from fastib.reference.cls_attention import cls_attention_maps_ref

__all__ = ["CapturedAttention", "capture_cls_attention"]

_PROJECTIONS = ("qkv", "k_proj", "in_proj", "k")  # the layer that is seen first, or alone, tells whose attention runs
_OWN = (MHCA, HeadTokenAttention)  # fused without F.scaled_dot_product_attention
_NAME = "capture_cls_attention"


def capture_cls_attention(
    model: nn.Module,
    *,
    over: str = "patches",
    scale: float | None = None,
    num_prefix_tokens: int | None = None,
    backend: str | None = None,
) -> CapturedAttention:
    """Context manager: what the class token attends to in each layer of `model`, at the cost of one row per head.

    `with capture_cls_attention(model) as captured: model(images)`, and then `captured.maps` and `captured.grids`. The
    queries and keys are those the model itself hands to `F.scaled_dot_product_attention` (after its norms and rotary
    positions, with its bias), or to fastib's own attention (MHCA; HeadTokenAttention, whose head tokens count in
    `over="all"` and are cut off like prefix tokens): nothing is projected twice and the model is not touched. The maps
    are differentiable.

    model: a timm or fastib vision transformer with a class token, or one wrapped by DistributedDataParallel, FSDP2 or
        torch.compile. Layers in which the class token does not attend (CaiT's first blocks) have no map.
    over, scale, backend: see `fastib.ops.cls_attention_maps`; scale None is the model's own. Layers with a bias or a
        mask on their attention use plain PyTorch.
    num_prefix_tokens: tokens before the patches, class token first; the model's own where None.

    Works under autocast, torch.compile (inside the compiled function, or around a compiled model) and non-reentrant
    checkpointing; the keys of checkpointed layers are then kept in memory. Not under nn.DataParallel, whose replicas
    run in threads of their own, and not under torch.compile and checkpointing at once.

    Raises ValueError where the model has no class token, drops patches at random or does not use fused attention, and
    RuntimeError in its forward pass where a layer's map cannot be told (two attentions in one layer, a causal mask,
    reentrant checkpointing, patches that fill no grid).
    """
    return CapturedAttention(model, over, scale, num_prefix_tokens, backend)


class CapturedAttention:
    """What `capture_cls_attention` gives. It may be entered again; each forward pass of the model replaces the last."""

    def __init__(
        self, model: nn.Module, over: str, scale: float | None, num_prefix_tokens: int | None, backend: str | None
    ):
        model = _unwrap(model)
        self.model_name = type(model).__name__
        if over not in ("patches", "all"):
            raise ValueError(f"{_NAME}: over must be 'patches' or 'all', got {over!r}")
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"{_NAME}: scale must be a finite number, got {scale}")
        self.over, self.scale, self.backend = over, scale, backend
        self.num_prefix_tokens = _prefix_tokens(model, self.model_name, num_prefix_tokens)
        self.patch_drop = getattr(model, "patch_drop", None)
        self.layers = _layers(model, self.model_name)
        self.projections = [_projection(attn) for _, attn in self.layers]
        self.embedding, self.full_grid = _patch_embedding(model)
        self._mode = _Observer(self)
        self.clear()

    def clear(self) -> None:
        """Forget the maps."""
        self.names: list[str] = []
        self._maps: list[Tensor] = []
        self.grids: list[tuple[int, int]] = []
        self._layer = -1
        self._tokens: Tensor | None = None  # projected, of a layer whose head tokens are still to come
        self._grid = self.full_grid
        self._with_grad: bool | None = None

    def __enter__(self) -> CapturedAttention:
        drop = self.patch_drop
        if drop is not None and drop.training and getattr(drop, "prob", 0.0) > 0:
            raise ValueError(f"{_NAME}: model must keep all patches; build it with patch_drop_rate=0")
        self.clear()
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)

    @property
    def maps(self) -> list[Tensor]:
        """(B, heads, patches) per layer, in the order in which the layers ran; rows are row-major grids.

        Raises RuntimeError where the model has not run inside the block.
        """
        if not self._maps:
            raise RuntimeError(
                f"{_NAME}: no maps; {self.model_name} has not run inside the `with` block, or not in its thread, or "
                "with checkpointing inside of a compiled function, which hides its attention"
            )
        return self._maps

    def stacked(self) -> Tensor:
        """All maps in (layer, head) order, (B, layers * heads, patches). ValueError where the grids differ."""
        if any(grid != self.grids[0] for grid in self.grids):
            raise ValueError(f"{_NAME}: the layers have maps of different grids: {sorted(set(self.grids))}")
        return torch.cat(self.maps, dim=1)

    def _see_embedding(self, out: Tensor) -> None:
        self._tokens, self._grid = None, (out.shape[-2], out.shape[-1])
        self._with_grad = torch.is_grad_enabled()

    def _see_linear(self) -> None:
        if self._layer >= 0 and self.layers[self._layer][0] in self.names:
            self._layer = -1  # its attention is over

    def _see_projection(self, index: int, out: Tensor) -> None:
        name, attn = self.layers[index]
        if isinstance(attn, HeadTokenAttention) and self._tokens is None:
            self._tokens = out
            return
        if name in self.names:  # another forward pass has begun
            self.names, self._maps, self.grids = [], [], []
        self._layer = index
        if isinstance(attn, MHCA):  # its bias is zero in the class token's row
            q, k = _queries_and_keys(out, attn)
            with self._unseen():
                q, k = attn.q_norm(q[:, :, :1]), attn.k_norm(k)
            self._add(q, k, attn.scale, None)
        elif isinstance(attn, HeadTokenAttention):
            q, k = _queries_and_keys(self._tokens, attn)
            self._tokens = None
            self._add(q, k, attn.scale, None, extra=_queries_and_keys(out, attn)[1])

    def _see_attention(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        if self._layer < 0:
            return
        name = self.layers[self._layer][0]
        if causal:
            raise RuntimeError(f"{_NAME}: {name} has a causal mask, under which the class token sees only itself")
        if name in self.names:
            raise RuntimeError(f"{_NAME}: {name} attends more than once in a layer; such layers have no single map")
        self._add(q, k, scale, None if mask is None else _row(mask, q))

    def _unseen(self) -> contextlib.AbstractContextManager:
        """What a checkpoint's recomputation will not see must not be among the tensors that the checkpoint counts."""
        return contextlib.nullcontext() if torch.compiler.is_compiling() else saved_tensors_hooks(_same, _same)

    def _add(self, q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None, extra: Tensor | None = None) -> None:
        name = self.layers[self._layer][0]
        if self._with_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{_NAME}: {name} runs without gradients, as under reentrant checkpointing; "
                "use checkpoint(..., use_reentrant=False)"
            )
        scale = self.scale if self.scale is not None else scale
        prefix = self.num_prefix_tokens
        if extra is not None and self.over == "all":  # among those that are cut off
            k, prefix = torch.cat((extra, k), dim=2), prefix + extra.shape[2]
        with self._unseen():
            if bias is None:
                maps = cls_attention_maps(
                    q[:, :, 0], k, num_prefix_tokens=prefix, scale=scale, over=self.over, backend=self.backend
                )
            else:
                maps = cls_attention_maps_ref(
                    q[:, :, 0], k, num_prefix_tokens=prefix, scale=scale, over=self.over, bias=bias
                )
        self.names.append(name)
        self._maps.append(maps)
        self.grids.append(self._grid_of(maps.shape[-1]))

    def _grid_of(self, patches: int) -> tuple[int, int]:
        if self._grid is None:
            side = math.isqrt(patches)
            rows, columns = side, side
        else:
            rows, columns = self._grid
            while rows * columns > patches:  # PiT pools with stride 2 and padding
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
        if rows * columns != patches:
            raise RuntimeError(f"{_NAME}: {patches} patches do not fill a grid of {self.model_name}, {self._grid}")
        return rows, columns


class _Observer(TorchFunctionMode):
    """Sees the calls of `torch.nn.functional` made inside the block. torch.compile traces it and guards on it."""

    def __init__(self, captured: CapturedAttention):
        super().__init__()
        self.captured = captured

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func not in (F.linear, F.conv2d, F.scaled_dot_product_attention):
            return out
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return out  # a checkpoint that computes its layer again, inside of a backward pass
        captured = self.captured
        if func is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            causal = kwargs.get("is_causal", args[5] if len(args) > 5 else False)
            captured._see_attention(args[0], args[1], mask, causal, kwargs.get("scale"))
            return out
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        if func is F.conv2d:
            if captured.embedding is not None and weight is captured.embedding.weight:
                captured._see_embedding(out)
            return out
        captured._see_linear()
        for index, projection in enumerate(captured.projections):
            if weight is projection.weight:
                captured._see_projection(index, out)
        return out


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _queries_and_keys(out: Tensor, attn: nn.Module) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) each, of a packed projection (B, N, 3 H D)."""
    return out.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)[:2]


def _row(mask: Tensor, q: Tensor) -> Tensor:
    """The class token's row of an attention mask, as a bias that broadcasts to (B, H, N)."""
    row = mask[..., 0, :]
    if row.dtype != torch.bool:
        return row
    return torch.zeros_like(row, dtype=q.dtype).masked_fill(~row, -math.inf)


def _unwrap(model: nn.Module) -> nn.Module:
    if hasattr(model, "_orig_mod"):
        return _unwrap(model._orig_mod)
    wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    return _unwrap(model.module) if wrapped else model


def _prefix_tokens(model: nn.Module, name: str, given: int | None) -> int:
    if given is not None:
        if given < 1:
            raise ValueError(f"{_NAME}: num_prefix_tokens must be at least 1, for the class token, got {given}")
        return given
    token = getattr(model, "cls_token", None)
    if token is None:
        raise ValueError(f"{_NAME}: model must have a class token; {name} has none (or give num_prefix_tokens)")
    return getattr(model, "num_prefix_tokens", token.shape[1])


def _projection(attn: nn.Module) -> nn.Module:
    return next(layer for layer in (getattr(attn, name, None) for name in _PROJECTIONS) if layer is not None)


def _layers(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Names and modules of the attention layers that call `F.scaled_dot_product_attention`, or are `_OWN`."""
    found = []
    for path, module in model.named_modules():
        fused = getattr(module, "fused_attn", isinstance(module, _OWN) or None)
        if fused is None or all(getattr(module, layer, None) is None for layer in _PROJECTIONS):
            continue
        if not fused:
            raise ValueError(f"{_NAME}: model must have its fused attention on, and {path}.fused_attn is False")
        found.append((path, module))
    if not found:
        raise ValueError(f"{_NAME}: model must have attention layers of timm's kind; {name} has none")
    return found


def _patch_embedding(model: nn.Module) -> tuple[nn.Conv2d | None, tuple[int, int] | None]:
    """The convolution whose output has the patches' grid, where it can be told, and the grid of the usual image."""
    embed = getattr(model, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    found = [getattr(embed, name, None) for name in ("proj", "conv")]
    if hasattr(embed, "sope"):  # DHVT's
        found.append(embed.sope.stages[-1][0])
    conv = next((layer for layer in found if isinstance(layer, nn.Conv2d)), None)
    return conv, None if grid is None else tuple(grid)
