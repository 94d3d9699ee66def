"""Modules around the operators, and parts that methods add to models while they train."""

from fastib.nn.aligner import Aligner
from fastib.nn.attention_link import AttentionLink
from fastib.nn.capture import capture_cls_attention
from fastib.nn.convert import apply_mhca
from fastib.nn.daff import DAFF
from fastib.nn.generalized_conv import GeneralizedConv2d
from fastib.nn.head_token_attention import HeadTokenAttention
from fastib.nn.involution import Involution2d
from fastib.nn.mhca import MHCA
from fastib.nn.sope import SOPE

__all__ = [
    "DAFF",
    "MHCA",
    "SOPE",
    "Aligner",
    "AttentionLink",
    "GeneralizedConv2d",
    "HeadTokenAttention",
    "Involution2d",
    "apply_mhca",
    "capture_cls_attention",
]
