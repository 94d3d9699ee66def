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


def scores(ptx: str) -> list[tuple[str, tuple[str, ...]]]:
    """Of each exponential of a score: the operation that gives its argument, and what the factors of the score are."""
    made = {}
    for operation, result, rest in re.findall(r"^\s*(?:@%\w+ )?([\w.]+)\s+(%\w+), (.*);$", ptx, re.MULTILINE):
        made[result] = operation.split(".")[0], [name.strip() for name in rest.split(",")]

    def fused(name: str) -> list[list[str]]:
        """Factors and addend of what a row's largest score is taken off."""
        operation, names = made.get(name, ("", []))
        if operation == "fma":
            return [names]
        return [each for part in names[: {"sub": 1, "selp": 2}.get(operation, 0)] for each in fused(part)]

    def kind(name: str) -> str:
        operation, names = made.get(name, ("", []))
        return "distance" if operation == "fma" and made.get(names[0], ("",))[0] == "sub" else "other"

    exponents = [names[0] for operation, names in made.values() if operation == "ex2"]
    return [(made[name][0], tuple(map(kind, names[:2]))) for name in exponents for names in fused(name)]


@pytest.mark.parametrize("name", CASES)
def test_scores_are_rounded_alike(monkeypatch, tmp_path, name):
    """A score is rounded before its row's largest one is taken off, and the position term before it is added to the
    product: else a large score would differ between tiles, and between forward and backward."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, case = CASES[name]
    operator = getattr(module, module.__name__.removeprefix("test_").removesuffix("_triton"))
    monkeypatch.setattr(operator.config, "chip_of", lambda q: 9)
    launches = launches_of(monkeypatch, module.KERNELS, lambda: module.run_kernels(case, module.inputs_of(case), "cpu"))
    kernels = [scores(compile_ahead(*launch, 90).asm["ptx"]) for launch in launches]
    assert sum(map(bool, kernels)) == (3 if module is head_token else 2)
    for found in filter(None, kernels):
        assert {operation for operation, _ in found} == {"sub"}, found
        assert not any("distance" in factors for _, factors in found), found
