"""A seeded synthetic trace with a structure that a placement can use; its ground truth is known.

Domain d prefers the experts d, d + D, d + 2 D ...: under the linear layout they are on all nodes,
and a placement that groups them keeps most tokens on one.
"""

import numpy as np

from moe_locality.trace import DECODE, PREFILL, RoutingTrace

DOMAINS = ("code", "math", "chat", "law")
MODEL = "synthetic/strided"


def make_trace(
    *,
    num_requests: int = 80,
    tokens_per_request: int = 12,
    num_experts: int = 16,
    num_layers: int = 3,
    top_k: int = 2,
    faithful: float = 0.9,
    model: str = MODEL,
    seed: int = 0,
) -> RoutingTrace:
    """Every pick is one of the domain's experts with probability ``faithful``, else any expert."""
    rng = np.random.default_rng(seed)
    count = num_requests * tokens_per_request
    request = np.repeat(np.arange(num_requests), tokens_per_request)
    domain = (request % len(DOMAINS)).astype(np.int32)
    own = num_experts // len(DOMAINS)
    ids = np.empty((count, num_layers, top_k), dtype=np.int16)
    for layer in range(num_layers):
        score = rng.random((count, num_experts))
        member = np.arange(num_experts)[None] % len(DOMAINS) == domain[:, None]
        loyal = rng.random(count) < faithful
        score += np.where(member & loyal[:, None], 1.0, 0.0)
        ids[:, layer] = np.argsort(-score, axis=1)[:, :top_k]
    assert own >= top_k
    position = np.tile(np.arange(tokens_per_request), num_requests).astype(np.int32)
    return RoutingTrace(
        model=model,
        num_experts=num_experts,
        layer_ids=np.arange(1, 2 * num_layers, 2, dtype=np.int32),
        domain=DOMAINS,
        expert_ids=ids,
        request_id=request.astype(np.int64),
        position=position,
        stage=np.where(position < tokens_per_request // 2, PREFILL, DECODE).astype(np.uint8),
        domain_id=domain,
    )
