"""Where experts and requests should live: plans, their costs, the solver, homes of requests.

Numpy, scipy and numba; nothing here imports torch. scipy and numba are imported inside the
functions that need them, so that reading a plan stays quick.
"""

from moe_locality.placement.costs import Costs, evaluate, traffic_matrix
from moe_locality.placement.homes.assign import assign_homes
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.solve import solve

__all__ = ["Costs", "PlacementPlan", "assign_homes", "evaluate", "solve", "traffic_matrix"]
