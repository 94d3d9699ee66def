"""The aligner of DearKD: student tokens shaped like a teacher's feature map."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Aligner"]


class Aligner(nn.Module):
    """Map content tokens to a CNN feature map (DearKD Sec. 3.1, Fig. 3).

    reshape -> bilinear interpolation -> depth-wise convolution -> pointwise convolution -> LayerNorm -> ReLU. A
    depth-wise convolution cannot change the number of channels, so a pointwise one (a linear layer) follows it.

    Args:
        dim: channels of the student's tokens.
        out_dim: channels of the teacher's map.
        kernel_size: of the depth-wise convolution; odd.
        device, dtype: of the parameters.

    Raises:
        ValueError: `kernel_size` is even, or the tokens do not fill the grid.
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 3, device=None, dtype=None):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        self.depthwise = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.pointwise = nn.Linear(dim, out_dim, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, tokens: Tensor, grid_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
        """Tokens (B, gh*gw, dim), row-major, to a map (B, out_dim, *out_size); both sizes are (rows, columns)."""
        batch, length, dim = tokens.shape
        if length != grid_size[0] * grid_size[1]:
            raise ValueError(f"tokens: expected {grid_size[0]} x {grid_size[1]} of them, got {length}")
        x = tokens.transpose(1, 2).reshape(batch, dim, *grid_size)
        if tuple(grid_size) != tuple(out_size):
            x = F.interpolate(x, size=tuple(out_size), mode="bilinear", align_corners=False)
        x = self.depthwise(x).permute(0, 2, 3, 1)
        return F.relu(self.norm(self.pointwise(x))).permute(0, 3, 1, 2)
