"""Where experts and requests should live: plans, their costs, the solver, homes of requests.

Numpy, scipy and numba; nothing here imports torch. scipy and numba are imported inside the
functions that need them, so that reading a plan stays quick.
"""

from moe_locality.placement.objective import Costs, evaluate, traffic_matrix
from moe_locality.placement.plan import PlacementPlan

__all__ = ["Costs", "PlacementPlan", "evaluate", "traffic_matrix"]
