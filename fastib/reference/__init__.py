"""The operators in plain PyTorch: oracle of the tests, baseline of the benchmarks, fallback where no kernel runs."""

from fastib.reference.attention_link import attention_link_loss_ref, augment_attention_ref
from fastib.reference.cls_attention import cls_attention_maps_ref
from fastib.reference.depthwise_block import depthwise_block_ref
from fastib.reference.feature_alignment import feature_alignment_loss_ref
from fastib.reference.generalized_conv import generalized_conv_ref
from fastib.reference.head_token_attention import head_token_attention_ref
from fastib.reference.involution import involution_ref
from fastib.reference.mhca_attention import mhca_attention_ref

__all__ = [
    "attention_link_loss_ref",
    "augment_attention_ref",
    "cls_attention_maps_ref",
    "depthwise_block_ref",
    "feature_alignment_loss_ref",
    "generalized_conv_ref",
    "head_token_attention_ref",
    "involution_ref",
    "mhca_attention_ref",
]
