"""What a training method is, and the registry that the command line reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

LoadTeacher = Callable[[str], nn.Module]


def wide(x: Tensor) -> Tensor:
    """At least float32, in which all losses are computed under autocast; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class MethodOptions:
    """Base of every method's options: the recipe's section ``method:``. ``name`` is filled in by the harness."""

    name: str = ""


@dataclass
class Analysis:
    """What ``fastib analyze`` shows.

    Attributes:
        tables: numbers or words by table, row and column.
        files: what it wrote.
        note: a closing line.
    """

    tables: dict[str, dict[str, dict[str, float | str]]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    note: str = ""


class Method(nn.Module):
    """A student, the parts that only training needs, and the losses that train them.

    Training-only parts with parameters (an aligner) are ordinary submodules: they are optimised and checkpointed.
    Frozen parts (a teacher) go through `freeze`, which keeps them out of parameters and state dict but moves them
    with the module.

    Args:
        options: an instance of the class's ``Options``.
        student: the model to train; ``student(images)`` gives logits (B, num_classes).
        num_classes: classes of the data set.
        load_teacher: ``"run:PATH"``, ``"timm:NAME"`` or a ``.safetensors`` path to a frozen module in eval mode.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    find_unused_parameters: ClassVar[bool] = False
    """True where some steps leave trainable parameters without a gradient (a second stage that drops a part)."""

    analyses: ClassVar[dict[str, Callable[..., Analysis]]] = {}
    """What ``fastib analyze NAME RUN key=value`` calls: f(state dict of the trained method, output folder, **keys).

    A parameter `student` gets the trained student in eval mode, a parameter `images` a function of a count that gives
    evaluation images (count, C, H, W), as the student sees them and as pictures in [0, 1].
    """

    def __init__(self, options: Any, student: nn.Module, num_classes: int, load_teacher: LoadTeacher):
        super().__init__()
        self.options = options
        self.num_classes = num_classes
        self.frozen: dict[str, nn.Module] = {}
        self.student = student

    def freeze(self, name: str, module: nn.Module) -> nn.Module:
        """Keep `module` as ``self.frozen[name]``: in eval mode, without gradients, outside of the state dict."""
        self.frozen[name] = module.eval().requires_grad_(False)
        return module

    def losses(self, images: Tensor, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Named scalar losses, already weighted; their sum is minimised.

        Args:
            images: (B, C, H, W).
            targets: (B,) int64, or (B, num_classes) soft targets under mixup or label smoothing.
            progress: completed optimizer steps over all steps of the run, in [0, 1).
        """
        raise NotImplementedError

    def forward(self, images: Tensor, targets: Tensor | None = None, progress: float = 0.0):
        """The losses; or the student's logits where there are no targets. DDP and FSDP wrap this call."""
        if targets is None:
            return self.student(images)
        return self.losses(images, targets, progress)

    def measure(self, images: Tensor, targets: Tensor) -> dict[tuple[str, str, str], Tensor]:
        """What ``fastib eval`` measures beside accuracy and loss: (table, row, column) to one value per image (B,).

        Values are averaged over the evaluation images. Called in eval mode and without gradients; training-only parts
        other than frozen ones have no trained weights there. A method that does not override this measures nothing.
        """
        return {}

    def backward(self, losses: dict[str, Tensor], accelerator) -> None:
        """Backward of one micro-batch. Override it for gradients that are not those of the plain sum."""
        accelerator.backward(sum(losses.values()))

    def export(self) -> nn.Module:
        """The plain student, without any training-only part."""
        return self.student

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: the student's own list, under this module's names."""
        names = getattr(self.student, "no_weight_decay", set)()
        return {f"student.{name}" for name in names}

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for module in self.frozen.values():
            module._apply(fn, recurse)
        return self


_METHODS: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make a method known to the command line as `name`."""

    def register(cls: type[Method]) -> type[Method]:
        if not (is_dataclass(cls.Options) and issubclass(cls.Options, MethodOptions)):
            raise TypeError(f"{cls.__name__}.Options must be a dataclass derived from MethodOptions")
        if name in _METHODS and _METHODS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"method {name!r} is already registered by {_METHODS[name].__qualname__}")
        _METHODS[name] = cls
        return cls

    return register


def get_method(name: str) -> type[Method]:
    """The method class registered as `name`. Raises ValueError that lists the known ones."""
    if name not in _METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(list_methods())}")
    return _METHODS[name]


def list_methods() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted(_METHODS)
