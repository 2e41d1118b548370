"""Families of transformers: the experts that ran are recorded, and docs/recording.md is true."""

import types

import numpy as np
import pytest
import torch
from transformers.integrations import mxfp4

from moe_locality.errors import TraceError
from moe_locality.trace import read_trace
from moe_locality.trace.recorder import attach
from tests.unit.trace import families
from tests.unit.trace.families import TOKENS, build, inputs, record


def test_attach_the_table_lists_every_family():
    """docs/recording.md has one row for each family of the installed transformers that has experts,
    in order [F9]."""
    rows = [line.split("|")[1].strip() for line in families.table()[1]]
    assert rows == families.families(), "run python -m tests.unit.trace.families"


@pytest.mark.parametrize("family", families.families())
def test_attach_every_family(tmp_path, family):
    """Experts that ran, told from the outputs that change with an expert's weights, are those
    recorded, and the family's row in docs/recording.md says what works [F9]."""
    assert families.row(family, tmp_path) in families.table()[1], (
        f"docs/recording.md has another row for {family}: run python -m tests.unit.trace.families; "
        "a new family may need values of its own in OWN"
    )


def largest(scores, count):
    """[T, E], the ``count`` largest of each row kept, minus infinity elsewhere."""
    kept = scores.topk(count).indices
    return torch.full_like(scores, -torch.inf).scatter(1, kept, scores.gather(1, kept))


def spread(ids, weights):
    """[T, E] of ids and weights [T, K]; ids past the experts fall away."""
    return torch.zeros(len(ids), 16).scatter_add(1, ids.long(), weights.float())[:, :8]


def of_pairs(logits):
    """Doge: each pair of a row and a column of keys is an expert."""
    rows, columns = logits.reshape(2, 16, 2)
    scores = (rows[:, :, None] + columns[:, None, :]).reshape(16, 4)
    return torch.nn.functional.pad(largest(scores, 2).softmax(1), (0, 4))


WEIGHTS = {
    "dbrx": ("ffn.router", lambda out: largest(out, 2).softmax(1)),
    "doge": ("router_gate", of_pairs),
    "jetmoe": ("mlp.router.layer", lambda out: largest(out, 2).softmax(1)),
    "llama4": ("feed_forward.router", lambda out: out[0]),
    "longcat_flash": ("mlp.router", lambda out: spread(out[2], out[1])),
    "nllb_moe": ("ffn.router", lambda out: out[1]),
    "step3p7": ("mlp.gate", lambda out: spread(out[2], out[1])),
    "switch_transformers": ("router", lambda out: (out[0] * out[1]).flatten(0, 1)),
    "zaya": ("mlp.gate", lambda out: spread(out[2], out[1])),
}
"""Families with a reader of their own: a module, and weights [T, E] from its output."""


@pytest.mark.parametrize("family", WEIGHTS)
def test_attach_weights(tmp_path, family):
    """Recorded weights are those of the router, expert by expert [F9]."""
    (where, expected), seen = WEIGHTS[family], []
    model = build(family)
    for name, module in model.named_modules():
        if name.endswith(f".{where}"):
            module.register_forward_hook(lambda _m, _a, out: seen.append(expected(out)))
    with torch.no_grad(), attach(model, tmp_path, strict=True, weights=True) as recorder:
        model(**inputs(family, model))
    trace = read_trace(tmp_path)
    assert len(seen) == len(recorder.layer_names) > 0
    assert family not in ("longcat_flash", "zaya") or (trace.expert_ids < 0).any()
    for layer, wanted in enumerate(seen):
        ids, weights = trace.expert_ids[:, layer].astype(int), trace.expert_weights[:, layer]
        found = np.zeros((trace.num_tokens, 9))
        np.put_along_axis(found, np.where(ids < 0, 8, ids), np.nan_to_num(weights), axis=1)
        in_encoder = "encoder" in recorder.layer_names[layer].split(".")
        rows = slice(0, len(wanted)) if in_encoder else slice(-len(wanted), None)
        np.testing.assert_allclose(found[rows, :8], wanted, rtol=1e-3, atol=1e-6)


def test_attach_nllb_records_the_picks_though_others_run(tmp_path):
    """What docs/recording.md says of it: transformers runs experts 0 and 1 whatever NLLB-MoE's
    router picks, and the picks are recorded [F9]."""
    trace, names, ran = record("nllb_moe", tmp_path)
    assert len(names) == len(ran) == 4
    assert all((found == (np.arange(8) < 2)).all() for found in ran.values())
    assert len(set(trace.expert_ids[trace.expert_ids >= 0])) > 2


def test_attach_ernie_vl_with_images(tmp_path):
    """What docs/recording.md says of it: a pass with text and images is not recorded [F9]."""
    model = build("ernie4_5_vl_moe")
    kinds = torch.zeros_like(TOKENS).index_fill(1, torch.arange(3), 1)
    with attach(model, tmp_path) as recorder, torch.no_grad():
        model(input_ids=TOKENS, moe_mm_token_type_ids=kinds)
        model(input_ids=TOKENS)
    assert recorder.report().skipped_forwards == 1
    assert read_trace(tmp_path).num_tokens == TOKENS.numel()


def test_attach_mxfp4_experts_of_gpt_oss(tmp_path, monkeypatch):
    """gpt-oss as a GPU loads it, with MXFP4 experts, was not found; a stand-in for the kernels,
    the module around them is transformers' own [F9]."""
    model, seen = build("gpt_oss"), []

    class StandIn(torch.nn.Module):
        num_experts = 8

        def forward(self, hidden_states, routing_data, gather_idx, scatter_idx):
            return hidden_states

        forward_routed = forward  # its name since transformers 5.24

    def routing(logits, top_k):
        seen.append(largest(logits, top_k).softmax(1).detach())
        return None, None, None

    monkeypatch.setattr(
        mxfp4,
        "triton_kernels_hub",
        types.SimpleNamespace(routing=types.SimpleNamespace(routing=routing)),
        raising=False,
    )
    for layer in model.model.layers:
        layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, StandIn())
    with attach(model, tmp_path, strict=True, weights=True), torch.no_grad():
        model(TOKENS)
    trace = read_trace(tmp_path)
    assert trace.num_experts == 8
    wanted = np.take_along_axis(np.stack(seen, axis=1), trace.expert_ids.astype(int), axis=2)
    np.testing.assert_allclose(trace.expert_weights, wanted, rtol=1e-3)
    assert (wanted > 0).all()


def test_attach_a_router_named_by_hand(tmp_path):
    """The error for models without known routers named no way out: routers= is one [F9]."""

    class Router(torch.nn.Linear):
        pass

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = Router(4, 6)

        def forward(self, x):
            return self.router(x)

    model, x = Net(), torch.randn(2, 3, 4)
    with pytest.raises(TraceError, match="routers="):
        attach(model, tmp_path / "none")
    routers = {Router: (6, lambda _module, _args, out: out.flatten(0, 1).topk(2).indices)}
    with attach(model, tmp_path / "hand", strict=True, routers=routers):
        out = model(x)
    found = read_trace(tmp_path / "hand").expert_ids[:, 0].astype(int)
    assert (np.sort(found) == np.sort(out.flatten(0, 1).topk(2).indices)).all()
