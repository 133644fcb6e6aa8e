"""Initialisation is a stage: LSUV, random initialisers, and the reports that say what they did."""

from minitrain.init.kinds import register_layer
from minitrain.init.lsuv import LSUV, layer_stats, lsuv_
from minitrain.init.random import KaimingNormal, Orthogonal, XavierNormal, Zero
from minitrain.init.report import InitReport, LayerRow, LSUVReport
from minitrain.init.stage import InitStage

__all__ = [
    "LSUV",
    "InitReport",
    "InitStage",
    "KaimingNormal",
    "LSUVReport",
    "LayerRow",
    "Orthogonal",
    "XavierNormal",
    "Zero",
    "layer_stats",
    "lsuv_",
    "register_layer",
]
