"""An offline batch engine for Hugging Face MoE models whose experts are spread over ranks."""

from moe_locality.serving.engine import Engine
from moe_locality.serving.metrics import Metrics
from moe_locality.serving.requests import (
    CompletionOutput,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    read_requests,
)
from moe_locality.serving.scheduler import Limits

__all__ = [
    "CompletionOutput",
    "Engine",
    "Limits",
    "Metrics",
    "Request",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "read_requests",
]
