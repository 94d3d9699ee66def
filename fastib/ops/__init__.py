"""The operators: fused where this machine can, in plain PyTorch where it cannot."""

from fastib.ops._backend import backends
from fastib.ops.attention_link import attention_link_loss, augment_attention
from fastib.ops.cls_attention import cls_attention_maps
from fastib.ops.depthwise_block import depthwise_block
from fastib.ops.feature_alignment import feature_alignment_loss
from fastib.ops.generalized_conv import generalized_conv
from fastib.ops.head_token_attention import head_token_attention
from fastib.ops.involution import involution
from fastib.ops.mhca_attention import mhca_attention

__all__ = [
    "attention_link_loss",
    "augment_attention",
    "backends",
    "cls_attention_maps",
    "depthwise_block",
    "feature_alignment_loss",
    "generalized_conv",
    "head_token_attention",
    "involution",
    "mhca_attention",
]
