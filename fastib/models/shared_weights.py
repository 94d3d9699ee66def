"""The tensors of a vision transformer that its agent CNN uses too (Bootstrapping ViTs, Eq. 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["SharedWeights"]

_PLACES = {"w_o": ("attn.proj", "weight"), "b_o": ("attn.proj", "bias"), "w_1": ("mlp.fc1", "weight"),
           "b_1": ("mlp.fc1", "bias"), "w_2": ("mlp.fc2", "weight"), "b_2": ("mlp.fc2", "bias"),
           "w_v": ("attn.qkv", "weight")}  # fmt: skip


class SharedWeights:
    """Reads the shared tensors of each block out of the ViT whenever they are used; it holds no copy of them.

    Names: w_v, the rows of the packed qkv's weight that make the values; w_o and b_o, the attention's output; w_1, b_1,
    w_2, b_2, the MLP. It is no module: a state dict has the tensors once, under the ViT's names.

    `part_ways` gives the agent leaves of its own that lie on the same memory: a backward pass then leaves the agent's
    gradient in them and the ViT's in the parameters, and the activations are kept once, as ever.

    ValueError where the model is no timm ViT with a packed qkv and plain MLPs.
    """

    def __init__(self, vit: nn.Module):
        self.vit = vit
        self.leaves: dict[tuple[int, str], Tensor] = {}
        blocks = getattr(vit, "blocks", None)
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks) or not all(map(_fits, blocks)):
            raise ValueError(
                f"vit: expected a timm ViT whose blocks have attn.qkv (packed), attn.proj, mlp.fc1 and mlp.fc2, "
                f"got {type(vit).__name__}"
            )

    @property
    def blocks(self) -> nn.Module:
        return self.vit.blocks

    def act(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The activation of a block's MLP."""
        return self.blocks[layer].mlp.act

    def owner(self, layer: int, name: str) -> tuple[nn.Parameter | None, slice]:
        """The parameter that holds a shared tensor, None where there is no such bias, and its rows."""
        block = self.blocks[layer]
        path, field = _PLACES[name]
        parameter = getattr(block.get_submodule(path), field)
        if name != "w_v":
            return parameter, slice(None)
        rows = parameter.shape[0] // 3
        return parameter, slice(2 * rows, 3 * rows)

    def read(self, layer: int, name: str) -> Tensor | None:
        """The shared tensor, or the agent's leaf on the same memory."""
        if (layer, name) in self.leaves:
            return self.leaves[layer, name]
        parameter, rows = self.owner(layer, name)
        return None if parameter is None else parameter[rows]

    @torch.compiler.disable
    def part_ways(self) -> None:
        """From now on the agent reads leaves of its own. Leaves that still lie on the parameters' memory are kept."""
        for layer in range(len(self.blocks)):
            for name in _PLACES:
                parameter, rows = self.owner(layer, name)
                if parameter is None or not parameter.requires_grad:
                    continue
                view, leaf = parameter.detach()[rows], self.leaves.get((layer, name))
                if leaf is None or leaf.data_ptr() != view.data_ptr() or leaf.dtype != view.dtype:
                    self.leaves[layer, name] = view.requires_grad_()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(gradient of the ViT, gradient of the agent) of each shared tensor that has got both; views, not copies."""
        for (layer, name), leaf in self.leaves.items():
            parameter, rows = self.owner(layer, name)
            if parameter.grad is not None and leaf.grad is not None:
                yield parameter.grad[rows], leaf.grad

    def clear(self) -> None:
        """Forgets the agent's gradients."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def __deepcopy__(self, memo: dict) -> SharedWeights:
        return SharedWeights(copy.deepcopy(self.vit, memo))


def _fits(block: nn.Module) -> bool:
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    linears = [
        getattr(attn, "qkv", None),
        getattr(attn, "proj", None),
        getattr(mlp, "fc1", None),
        getattr(mlp, "fc2", None),
    ]
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        return False
    qkv, proj, fc1, fc2 = linears
    return (
        qkv.out_features == 3 * proj.in_features
        and proj.in_features % attn.num_heads == 0
        and proj.out_features == qkv.in_features == fc1.in_features == fc2.out_features
        and fc1.out_features == fc2.in_features
        and not isinstance(getattr(mlp, "norm", None), nn.LayerNorm)
    )
