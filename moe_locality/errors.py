"""Errors of moe_locality: one base and five children, each a kind of trouble that the user can act
on.

A message has three parts: what was found, what was expected, what to do.
"""


class MoeLocalityError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MoeLocalityError, ValueError):
    """The configuration asks for something unknown, contradictory or not supported."""


class TraceError(MoeLocalityError, ValueError):
    """A routing trace is damaged, does not fit the others, or breaks an invariant."""


class PlacementError(MoeLocalityError, ValueError):
    """A placement plan is invalid, infeasible, or does not fit the model or the cluster."""


class TopologyError(MoeLocalityError, ValueError):
    """A hostfile or cluster description is wrong, or groups do not fit the cluster."""


class BackendUnavailable(MoeLocalityError, RuntimeError):
    """A backend, a package or a kernel that was asked for by name is not usable here."""
