"""Figures of the report: plain data (:mod:`.data`) in, matplotlib figures and SVG text
(:mod:`.draw`) out.
"""

from moe_locality.figures.data import (
    Basis,
    FigureData,
    LayersData,
    LoadData,
    LossData,
    SimilarityData,
    Table,
    TradeoffData,
    TradeoffPoint,
    TrafficData,
    numbers,
)
from moe_locality.figures.draw import draw, png_bytes, short, svg_text

__all__ = [
    "Basis",
    "FigureData",
    "LayersData",
    "LoadData",
    "LossData",
    "SimilarityData",
    "Table",
    "TradeoffData",
    "TradeoffPoint",
    "TrafficData",
    "draw",
    "numbers",
    "png_bytes",
    "short",
    "svg_text",
]
