"""What a patch embedding of stacked convolutions shares with timm's PatchEmbed: sizes and grids."""

from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GridPatchEmbed"]


class GridPatchEmbed(nn.Module):
    """Takes the place of timm's PatchEmbed: `img_size`, `patch_size`, `grid_size`, `num_patches` and its methods.

    Args:
        img_size, patch_size, strict_img_size, dynamic_img_pad: as in timm's PatchEmbed.

    Raises:
        ValueError: an image size that is no multiple of the patch size.
    """

    def __init__(self, img_size, patch_size, strict_img_size: bool = True, dynamic_img_pad: bool = False):
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.strict_img_size, self.dynamic_img_pad = strict_img_size, dynamic_img_pad
        self._set_size(img_size)

    def _set_size(self, img_size) -> None:
        size = to_2tuple(img_size)
        if not self.dynamic_img_pad and any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"img_size: expected multiples of patch_size {self.patch_size}, got {size}")
        self.img_size, self.grid_size = size, self.dynamic_feat_size(size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """A new image size. ValueError for another patch size, which the layers are made for."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"patch_size: expected {self.patch_size}, fixed in these layers, got {patch_size}")
        if img_size is not None:
            self._set_size(img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per patch, the larger side or both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The patch grid of an image of this size."""
        (height, width), (rows, columns) = img_size, self.patch_size
        pad = self.dynamic_img_pad
        return (height + pad * (rows - 1)) // rows, (width + pad * (columns - 1)) // columns

    def fit(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), padded to whole patches where `dynamic_img_pad` is set.

        ValueError for images of another size than `img_size`, or where sizes are free, than a multiple of `patch_size`.
        """
        height, width = x.shape[-2:]
        rows, columns = self.patch_size
        if self.strict_img_size and (height, width) != self.img_size:
            raise ValueError(f"x: expected images of {self.img_size} pixels, got {(height, width)}")
        if self.dynamic_img_pad:
            return F.pad(x, (0, -width % columns, 0, -height % rows))
        if height % rows or width % columns:
            raise ValueError(f"x: expected sides that are multiples of {self.patch_size}, got {(height, width)}")
        return x
