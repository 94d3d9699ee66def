"""Models registered with timm: import this package, then ``timm.create_model(name)`` finds them."""

from fastib.models.dearkd import DearKDVisionTransformer, distillation_outputs
from fastib.models.small_cnn import SmallCNN

__all__ = ["DearKDVisionTransformer", "SmallCNN", "distillation_outputs"]
