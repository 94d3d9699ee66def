"""The scores of the Triton attention kernels, as compiled: all kernels round them alike."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import test_head_token_attention_triton as head_token
import test_mhca_attention_triton as mhca
from triton_tools import compile_ahead, launches_of

CASES = {
    "keys on chip": (mhca, mhca.Case(1, 2, (14, 14), 1, 32, torch.bfloat16)),
    "no prefix": (mhca, mhca.Case(1, 2, (24, 24), 0, 32, torch.float16)),
    "float32": (mhca, mhca.Case(1, 2, (14, 14), 1, 32, torch.float32)),
    "no position": (head_token, head_token.Case(1, 2, 65, 4, 48, torch.bfloat16)),
    "no position, float32": (head_token, head_token.Case(1, 2, 65, 4, 48, torch.float32)),
}


def exponents(ptx: str) -> list[tuple[str, ...]]:
    """Of each exponential what its argument is the difference of, and of a fused score the factors and the addend."""
    made = {}
    for operation, result, rest in re.findall(r"^\s*(?:@%\w+ )?([\w.]+)\s+(%\w+), (.*);$", ptx, re.MULTILINE):
        made[result] = operation.split(".")[0], [name.strip() for name in rest.split(",")]

    def kind(name: str) -> str:
        operation, names = made.get(name, ("constant", []))
        squares = operation == "fma" and made.get(names[0], ("",))[0] == "sub"
        return "distance" if squares else operation

    found = []
    for (argument,) in (names for operation, names in made.values() if operation == "ex2"):
        operation, names = made.get(argument, ("", []))
        path = [operation]
        while operation in ("sub", "selp"):
            operation, names = made.get(names[0], ("", []))
        found.append((*path, *(kind(name) for name in names if operation == "fma")))
    return found


@pytest.mark.parametrize("name", CASES)
def test_scores_are_rounded_alike(monkeypatch, tmp_path, name):
    """The product and the position term are rounded to a score before its row's largest one is taken off, and never by
    the fusing of a distance: a large score would differ between tiles, and between forward and backward."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, case = CASES[name]
    operator = getattr(module, module.__name__.removeprefix("test_").removesuffix("_triton"))
    monkeypatch.setattr(operator.config, "chip_of", lambda q: 9)
    launches = launches_of(monkeypatch, module.KERNELS, lambda: module.run_kernels(case, module.inputs_of(case), "cpu"))
    for kernel, args, options in launches[:2]:
        found = exponents(compile_ahead(kernel, args, options, 90).asm["ptx"])
        scores = [one for one in found if len(one) == 4]
        assert scores, found
        for difference, *factors, _ in scores:
            assert difference == "sub" and "distance" not in factors
