"""Home ranks of requests: what each would cost where, predictions for new ones, and who goes where.

``assign_homes`` homes the requests of a trace under a plan; ``joint`` finds homes and places at
once.
"""

from moe_locality.placement.homes.assign import assign_homes

__all__ = ["assign_homes"]
