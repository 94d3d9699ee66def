"""`capture_cls_attention` on deit_small_patch16_224 against the way without it: fused attention off, all rows kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import Peer, Step
from benchmarks.house import Job
from benchmarks.replay import REPLAY

OP = "capture_cls_attention"
RESULTS = {"forward": ("logits", "maps"), "train": ("logits", "maps", "first qkv", "last qkv")}


@dataclass(frozen=True)
class Case:
    """One row of the table: images per batch, mode "forward" or "train", options of the model."""

    batch: int
    mode: str
    device: str = "cpu"
    options: dict = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        return f"{self.device}-{self.mode}-{OP}-B{self.batch}-float32"


class Inputs:
    """The model and the images of a case, made when first asked for."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def made(self) -> tuple[nn.Module, Tensor]:
        import timm

        torch.manual_seed(7)
        model = timm.create_model("deit_small_patch16_224", **self.case.options).to(self.case.device)
        size = model.patch_embed.img_size
        return model, torch.randn(self.case.batch, 3, *size, device=self.case.device)

    def step(self, look: Callable[[nn.Module, Tensor], tuple[Tensor, list[Tensor]]], dtype=None) -> Step:
        """`look` gives logits and maps (B, heads, patches) per layer; training adds gradients of a loss of both."""

        def step(checking: bool) -> tuple[Tensor, ...]:
            model, images = self.made
            if dtype is not None:
                model, images = copy.deepcopy(model).to(dtype), images.to(dtype)
            if self.case.mode == "forward":
                with torch.no_grad():
                    logits, maps = look(model, images)
                return logits, torch.cat(maps, 1) if maps else logits.new_zeros(())
            logits, maps = look(model, images)
            loss = logits.square().mean() + sum(m.square().sum() for m in maps)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            by_name = dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))
            last = len(model.blocks) - 1
            return (
                logits.detach(),
                torch.cat(maps, 1).detach() if maps else logits.new_zeros(()),
                by_name["blocks.0.attn.qkv.weight"],
                by_name[f"blocks.{last}.attn.qkv.weight"],
            )

        return step

    def release(self) -> None:
        """Drops the model; it is made again, the same, if it is asked for."""
        self.__dict__.pop("made", None)


def captured(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Ours: fused attention, and one row beside it."""
    from fastib import capture_cls_attention

    with capture_cls_attention(model) as seen:
        logits = model(images)
    return logits, seen.maps


def unfused(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Fused attention off, and a hook that keeps the class token's row of the probabilities."""
    rows, layers = [], [block.attn for block in model.blocks]
    hooks = [a.attn_drop.register_forward_hook(lambda _, args, __: rows.append(args[0][:, :, 0, 1:])) for a in layers]
    for layer in layers:
        layer.fused_attn = False
    try:
        logits = model(images)
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            layer.fused_attn = True
            hook.remove()
    return logits, [row / row.sum(-1, keepdim=True) for row in rows]


def no_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model alone: what the maps cost is the difference to this."""
    return model(images), []


def make_job(case: Case) -> Job:
    """A case with its peers."""
    inputs = Inputs(case)
    return Job(
        key=case.key,
        op=OP,
        mode=case.mode,
        device=case.device,
        describe={"shape": {"B": case.batch, "layers": 12, "H": 6, "N": 197, "D": 64}, "dtype": "float32"},
        peers=[
            Peer("fastib", lambda: inputs.step(captured)),
            Peer("fused off", lambda: inputs.step(unfused), note="all rows of the probabilities, of which one is kept"),
            Peer("no maps", lambda: inputs.step(no_maps), gated=False, note="the model alone"),
        ],
        reference=lambda: inputs.step(unfused, torch.float64)(True),
        allowed=dict.fromkeys(RESULTS[case.mode], 1e-3),
        release=inputs.release,
        seconds=30.0,
        min_rounds=5,
    )


def small_job(device: str) -> Job:
    """A case small enough for a memory checker."""
    options = {"img_size": 48, "embed_dim": 24, "num_heads": 3, "depth": 2}
    return make_job(Case(2, "train", device, options))


def jobs(device: str, config) -> list[Job]:
    batch = 256 if device == "cuda" else 4
    return [make_job(Case(batch, mode, device)) for mode in ("train", "forward")]


@pytest.mark.benchmark(timer=REPLAY.now)
def test_capture(job, peer, run_peer):
    run_peer(job, peer)
