"""Homes of requests that arrive one by one: each is placed when it comes and stays there.

The same prediction and the same prices as for a batch (``placement.assign_homes``), with running
sums of tokens instead of a list of all requests. No torch in here.
"""

from __future__ import annotations

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.homes.assign import (
    MAX_TOKEN_IMBALANCE,
    expected_costs,
    predictor_of,
    scores_of_known,
)
from moe_locality.placement.homes.predictor import check_prediction, serving_of_plan
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import check_topology
from moe_locality.topology.cluster import ClusterTopology

HORIZON_REQUESTS = 16
"""Requests per rank before the cap binds: the first ones cannot be balanced without ignoring where
their experts are."""


class ArrivingHomes:
    """Assigns a home rank to each new request; the work does not grow with the requests before it.

    A rank takes a request while it stays below ``max_imbalance`` times the mean of all ranks (of
    ``HORIZON_REQUESTS`` requests per rank, where fewer have come); where no rank does, the one with
    fewest tokens takes it. The result depends on the order of arrival and on nothing else.

    Args:
        plan: from ``solve(..., homes="joint")``, whose ``home_profiles`` have the prediction and
            the prices; without them only the known tokens count.
        predict: what ``assign`` will be given, "prefill" or "first:N".

    Raises:
        PlacementError: the plan does not fit the cluster, or ``predict`` is no window of tokens.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        topology: ClusterTopology | None = None,
        *,
        predict: str = "prefill",
        max_imbalance: float = MAX_TOKEN_IMBALANCE,
    ) -> None:
        check_prediction(predict)
        if predict in ("domain", "oracle"):
            raise PlacementError(
                f"predict: found {predict!r}, expected 'prefill' or 'first:N': a request that "
                "arrives is known by its first tokens"
            )
        if not max_imbalance >= 1:
            raise PlacementError(f"max_imbalance: found {max_imbalance}, expected at least 1")
        self._predict, self._topology = predict, topology
        self._max_imbalance = max_imbalance
        self.follow(plan)
        self._tokens = np.zeros(plan.num_ranks, dtype=np.int64)
        self._requests = 0

    def follow(self, plan: PlacementPlan) -> None:
        """Take a plan for the same ranks whose experts have moved; what is assigned stays so."""
        check_topology(plan, self._topology)
        profiles = plan.home_profiles or {}
        self._serving = serving_of_plan(plan, profiles.get("objective", "copies"))
        self._model = predictor_of(plan, self._predict)
        self._rows = np.arange(plan.num_layers)
        self._shape = (plan.num_layers, plan.num_experts)
        price = profiles.get("token_price") or np.zeros(plan.num_nodes)
        self._price = np.asarray(price, dtype=float)[plan.node_of_rank]

    @property
    def tokens_per_rank(self) -> np.ndarray:
        """[G] tokens assigned so far."""
        return self._tokens.copy()

    def assign(self, expert_ids: np.ndarray, tokens: int) -> int:
        """The home rank of a new request, which from now on counts.

        Args:
            expert_ids: [n, L, K] picks of the known tokens (n may be 0), -1 = no pick, layers as in
                the plan.
            tokens: tokens that the request is expected to have in all; ``correct`` repairs it.

        Raises:
            PlacementError: an array of another shape, ids that are no experts, negative tokens.
        """
        return self.assign_scored(self.score(expert_ids), tokens)

    def score(self, expert_ids: np.ndarray) -> np.ndarray:
        """[G] how well each rank suits a request with these picks; any rank may compute it."""
        ids = np.asarray(expert_ids)
        layers, experts = self._shape
        if ids.ndim != 3 or ids.shape[1] != layers or ids.dtype.kind not in "iu":
            raise PlacementError(
                f"expert_ids: found {ids.dtype} of shape {ids.shape}, expected integers of shape "
                f"[tokens, {layers}, top_k]: give the layers of the plan"
            )
        if ids.size and (int(ids.min()) < -1 or int(ids.max()) >= experts):
            raise PlacementError(
                f"expert_ids: found {int(ids.min())} to {int(ids.max())}, expected -1 to "
                f"{experts - 1}: give logical ids"
            )
        if self._model is None and not len(ids):
            return -self._price
        ids = np.ascontiguousarray(ids, dtype=np.int16)
        request, known = np.zeros(len(ids), dtype=np.int64), np.array([len(ids)])
        cost = self._serving.costs(ids, request, 1)
        expected = expected_costs(self._model, self._rows, ids, request, cost, known)
        return scores_of_known(self._serving, expected, ids, request)[0] - self._price

    def assign_scored(self, score: np.ndarray, tokens: int) -> int:
        """:meth:`assign` for a ``score [G]``."""
        return int(self.assign_together(score[None], np.array([tokens]))[0])

    def assign_together(self, scores: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The home ranks ``[n]`` of requests that arrive at once, with ``scores [n, G]``.

        Those with most to lose choose first, under the mean that includes all of them.
        """
        if (tokens < 0).any():
            raise PlacementError(f"tokens: found {tokens.min()}, expected 0 or more")
        ranks, self._requests = len(self._tokens), self._requests + len(tokens)
        most = self._max_imbalance * int(self._tokens.sum() + tokens.sum()) / ranks
        most *= max(HORIZON_REQUESTS * ranks / max(self._requests, 1), 1)
        homes = np.zeros(len(tokens), dtype=np.int64)
        stake = (scores.max(axis=1) - scores.mean(axis=1)) * tokens
        for one in np.argsort(-stake, kind="stable"):
            fits = self._tokens + tokens[one] <= most
            worth = np.where(fits, scores[one], -np.inf) if fits.any() else 0 * self._tokens
            homes[one] = np.lexsort((self._tokens, -worth))[0]
            self._tokens[homes[one]] += tokens[one]
        return homes

    def correct(self, rank: int, expected: int, actual: int) -> None:
        """Count a request of ``rank`` as ``actual`` tokens, not as the ``expected`` ones."""
        self._tokens[rank] += actual - expected
