"""What a routing trace shows: balance, similarity of domains and stages, co-activation. numpy."""

from moe_locality.analysis.stats import analyze

__all__ = ["analyze"]
