"""Triton kernels without a GPU: Triton's interpreter, and machine code compiled ahead of time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def complete_interpreter() -> None:
    """Lets Triton's interpreter multiply bfloat16 matrices, which it keeps as integers, and round to bfloat16 as a GPU
    does, where it truncates; and that of Triton 3.6 take loop bounds from one-element arrays, which NumPy 2.4 refuses.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand.data
        return (operand.data.astype("uint32") << 16).view("float32")

    def create_dot(self, a, b, acc, *_):
        product = wide(a).astype(acc.data.dtype) @ wide(b).astype(acc.data.dtype)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    convert = interpreter._convert_float

    def rounded(value, from_type, to_type, mode):
        if (from_type, to_type) != (tl.float32, tl.bfloat16):
            return convert(value, from_type, to_type, mode)
        bits = value.view("uint32")
        return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("uint16")

    interpreter._convert_float = rounded
    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = create_dot


def interpreted_reports(script: str) -> dict[str, dict]:
    """What `script` prints when run in Triton's interpreter: JSON lines, by their name."""
    environment = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


class Recorder:
    """Stands for a kernel and keeps what it is launched with, in place of a launch."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


def launches_of(monkeypatch, kernels, run) -> list:
    """(kernel, arguments, options) of every launch of `kernels`, pairs of module and name, while run() runs."""
    recorders = [Recorder(getattr(module, name)) for module, name in kernels]
    for (module, name), recorder in zip(kernels, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    run()
    return [(r.kernel, *launch) for r in recorders for launch in r.launches]


def compile_ahead(kernel, args, options: dict, capability: int):
    """What Triton makes of a launch, specialised as the launch would be."""
    names = dict(zip(kernel.arg_names, args, strict=False))
    launch = {name: value for name, value in options.items() if name not in kernel.arg_names}
    names |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = names[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (specialise and type(value) is int and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def compile_launch(kernel, args, options: dict, capability: int) -> tuple[dict, str]:
    """Resource usage and machine code of a launch."""
    binary = compile_ahead(kernel, args, options, capability)
    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return usage | {"SHARED": binary.metadata.shared}, code
