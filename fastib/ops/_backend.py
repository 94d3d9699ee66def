"""What every operator shares: the choice of a backend, and registration in `torch.ops.fastib`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastib import _gpu_limits as limits
from fastib import _native
from fastib._exporting import exporting

BACKENDS = ("reference", "cpu", "cuda", "triton")
LIBRARY = torch.library.Library("fastib", "FRAGMENT")
OPS: dict[str, Op] = {}


class Op:
    """Where one operator can run.

    gpu: its GPU implementation, "triton" or "cuda". kernel: name of the operator that holds its kernels, where that is
        not `name`. gpu_limits: of the tensors given to `choose`, why the GPU kernels do not take them, or None; it asks
        for no GPU.
    """

    def __init__(
        self, name: str, gpu: str, kernel: str | None = None, gpu_limits: Callable[..., str | None] = limits.dtype
    ):
        self.name, self.gpu, self.kernel = name, gpu, kernel or name
        self.gpu_limits = gpu_limits
        self.no_cpu_code, self.no_gpu_code = self._why_no_cpu_code(), self._why_no_gpu_code()
        self.cpu_default = "reference" if self.no_cpu_code else "cpu"
        self.gpu_default = "reference" if self.no_gpu_code else gpu
        OPS[name] = self

    def _has_kernel(self, key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastib::{self.kernel}", key)

    def _why_no_cpu_code(self) -> str | None:
        if not _native.lib_available():
            return _native.why_not()
        return None if self._has_kernel("CPU") else "the compiled library is older than this operator; build it again"

    def _why_no_gpu_code(self) -> str | None:
        if self.gpu == "triton":
            missing = importlib.util.find_spec("triton") is None
            return "triton is not installed; `pip install triton`" if missing else None
        if not _native.lib_available():
            return _native.why_not()
        return None if self._has_kernel("CUDA") else "the compiled library has no CUDA; install nvcc and build it again"

    def why_not(self, backend: str) -> str | None:
        """Why this machine cannot run the backend; None where it can. Asks for a GPU, so never called at import."""
        if backend == "reference":
            return None
        if backend == "cpu":
            return self.no_cpu_code
        if backend != self.gpu:
            return f"the GPU implementation of {self.name} is {self.gpu!r}"
        if not torch.cuda.is_available():
            return "no CUDA device"
        return self.no_gpu_code

    def choose(self, backend: str | None, x: Tensor, *more: Tensor) -> str:
        """The backend that runs inputs like these. Raises RuntimeError where the one asked for cannot.

        Where none is asked for, what the GPU kernels do not take goes to the reference; and everything does under
        forward-mode AD and the transforms of `torch.func`, as it alone has that derivative and their rules.
        """
        missing = self._missing_rule()
        if backend is None:
            if missing is not None:
                return "reference"
            if x.is_cpu:
                if self.cpu_default == "reference" and not torch.compiler.is_compiling():
                    _native.warn_absent()
                return self.cpu_default
            return self.gpu_default if x.is_cuda and self.gpu_limits(x, *more) is None else "reference"
        if backend not in BACKENDS:
            raise ValueError(f"{self.name}: backend must be None or one of {BACKENDS}, got {backend!r}")
        reason = self.why_not(backend)
        if missing is not None and backend != "reference":
            reason = missing
        if reason is None and backend != "reference":
            device = "cpu" if backend == "cpu" else "cuda"
            if x.device.type != device:
                reason = f"it runs {device} tensors, and the inputs are on {x.device}"
            elif device == "cuda":
                reason = self.gpu_limits(x, *more)
        if reason is not None:
            raise RuntimeError(
                f"{self.name}: backend={backend!r} is not available: {reason}. "
                "Pass backend=None to choose one that is, or backend='reference' for plain PyTorch."
            )
        return backend

    @staticmethod
    def _missing_rule() -> str | None:
        """What the kernels do not have that is asked for here; None where nothing is."""
        if forward_ad._current_level >= 0:
            return "it has no forward-mode derivative"
        if torch._C._are_functorch_transforms_active():
            return "it has no rules for the transforms of torch.func (grad, vjp, vmap, ...)"
        return None


def backends() -> dict[str, dict[str, bool | str]]:
    """Per operator and backend: True, or the reason why it is not available here."""
    return {name: {b: op.why_not(b) or True for b in BACKENDS} for name, op in OPS.items()}


def register(name: str, schema: str, fake: Callable, triton: str | None = None) -> Any:
    """Registers `fastib::name` and returns it (an OpOverload).

    The schema is defined here only where the native library has not done so. `triton` names the launcher in
    `fastib.kernels.triton.<op>` that is its CUDA kernel, as "module.function"; it is imported at the first call.
    """
    if not (_native.lib_available() and hasattr(torch.ops.fastib, name)):
        LIBRARY.define(name + schema)
    torch.library.register_fake(f"fastib::{name}", fake, lib=LIBRARY)
    if triton is not None:
        LIBRARY.impl(name, _launch_triton(*triton.split(".")), "CUDA")
    return getattr(torch.ops.fastib, name).default


def register_backward(op: str, name: str, schema: str, fake: Callable, triton: str | None = None) -> Callable:
    """Registers `fastib::name`, the gradients of `op`, and returns it as a function that has no derivative.

    Called below autograd, unless a graph of the gradients is made. Its arguments are there before: unpacking saved
    tensors may run a checkpointed forward again.
    """
    kernel = register(name, schema, fake, triton)

    def refuse(ctx: Any, *_: Any) -> None:
        raise _no_second_derivative(op)

    torch.library.register_autograd(f"fastib::{name}", refuse, lib=LIBRARY)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return kernel(*args)
        with below_autograd():
            return kernel(*args)

    return call


def _launch_triton(module: str, function: str) -> Callable:
    @functools.cache
    def launcher() -> Callable:
        return getattr(importlib.import_module(f"fastib.kernels.triton.{module}"), function)

    def launch(*args: Any) -> Any:
        device = args[0].get_device()
        if device == torch.cuda.current_device():
            return launcher()(*args)
        with torch.cuda.device(device):
            return launcher()(*args)

    return launch


def is_recorded() -> bool:
    """Whether a compiler or `torch.jit.trace` records the call: it goes through the dispatcher alone then."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def may_train_later() -> bool:
    """Whether the recorded program outlives the call: it may train where the call does not."""
    return exporting() or torch._C._is_tracing()


def below_autograd() -> Any:
    """A context in which a `torch.ops` call goes straight to the kernel; autograd is the caller's affair."""
    return torch._C._AutoDispatchBelowAutograd()


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, tie: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise _no_second_derivative(ctx.op)


def tie(*inputs: Tensor) -> Tensor:
    """An empty tensor that autograd takes for a function of the inputs, none of which it keeps."""
    return _Tie.apply(*inputs)


def once(op: str, tie: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a loss that come with it; where a graph of them is made, one that refuses to be differentiated.

    tie: of the inputs that the gradients belong to.
    """
    return _Once.apply(op, tie, *gradients) if torch.is_grad_enabled() else gradients


def _no_second_derivative(op: str) -> RuntimeError:
    return RuntimeError(f"{op}: the kernels have no second derivative; pass backend='reference'")


def channels_last(x: Tensor) -> bool:
    """Whether the kernels take a (B, C, rows, columns) image for channels_last."""
    return x.stride(1) == 1 and x.stride(3) != 1


def empty_image(x: Tensor, rows: int, columns: int, channels: int | None = None) -> Tensor:
    """A new image of another size, dense and in the memory format of `x`; channels None: as many as `x` has."""
    batch = x.shape[0]
    channels = x.shape[1] if channels is None else channels
    if channels_last(x):
        return x.new_empty((batch, rows, columns, channels)).permute(0, 3, 1, 2)
    return x.new_empty((batch, channels, rows, columns))
