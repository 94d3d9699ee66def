"""Supervised training and nothing else: the baseline of every method, and how teachers are trained."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastib.methods.base import Method, register_method, wide


@register_method("plain")
class Plain(Method):
    """Cross entropy between the student's logits and the targets."""

    def losses(self, images: Tensor, targets: Tensor, progress: float) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(wide(self.student(images)), targets)}
