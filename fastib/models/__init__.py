"""Models registered with timm: import this package, then ``timm.create_model(name)`` finds them."""

from fastib.models.agent_cnn import AgentCNN, agent_for
from fastib.models.bootstrap import BootstrapVisionTransformer
from fastib.models.cit import CiT
from fastib.models.dearkd import DearKDVisionTransformer, distillation_outputs
from fastib.models.dhvt import DHVT, convert_published_dhvt
from fastib.models.rednet import RedNet, convert_published_rednet
from fastib.models.small_cnn import SmallCNN

__all__ = [
    "DHVT",
    "AgentCNN",
    "BootstrapVisionTransformer",
    "CiT",
    "DearKDVisionTransformer",
    "RedNet",
    "SmallCNN",
    "agent_for",
    "convert_published_dhvt",
    "convert_published_rednet",
    "distillation_outputs",
]
