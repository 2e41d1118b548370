"""The placement plan: schema.py (the class and its file), checks.py, serving.py (which replica
serves whom).
"""

from moe_locality.placement.plan.schema import FORMAT_VERSION, PlacementPlan

__all__ = ["FORMAT_VERSION", "PlacementPlan"]
