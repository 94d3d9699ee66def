"""Whether a program is being exported."""

import torch


def exporting() -> bool:
    """`torch.compiler.is_exporting()`, which torch 2.11 takes for true in whatever `torch.compile` traces."""
    return torch.compiler._is_exporting_flag
