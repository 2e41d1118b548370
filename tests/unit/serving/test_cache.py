"""Rows of real transformers caches: put together, taken apart and packed, they go on as before."""

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("moe_locality.serving", reason="transformers before 5.23")

from moe_locality.serving.cache import (  # noqa: E402
    Rows,
    assemble,
    pack_row,
    pass_inputs,
    row_bytes,
    row_tensors,
    unpack_row,
)
from tests.distributed.test_transformers_ep import FAMILIES, SIZES  # noqa: E402

CASES = {
    "Mixtral": {},
    "Mixtral, sliding": {"sliding_window": 6},
    "GptOss": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "DeepseekV3": {},
    "Qwen3Next": {},
}


def build(case):
    family = case.partition(",")[0]
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **FAMILIES[family], **CASES[case]}
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def run(model, rows, tokens):
    given = pass_inputs(rows, tokens)
    given.pop("valid", None)
    with torch.no_grad():
        logits = model(**given, cache=rows.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    rows.lengths = [old + len(new) for old, new in zip(rows.lengths, tokens, strict=True)]
    return logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_assemble_and_unpack_row_go_on_as_the_rows_alone(case, seed):
    model, rng = build(case), np.random.default_rng(seed)
    alone, texts = [], []
    for length in rng.integers(1, 14, 4):
        texts.append(rng.integers(0, 96, length).tolist())
        alone.append(Rows.empty(model.config, 1))
        run(model, alone[-1], [texts[-1]])
    batch = assemble([(rows, 0) for rows in alone])
    assert batch.lengths == [len(text) for text in texts]
    order = list(range(4))
    for step in range(6):
        if step == 2:  # the longest leaves, one comes back from another rank, the order changes
            order.remove(max(order, key=lambda i: batch.lengths[i]))
            order = [order[2], order[0], order[1]]
            index = [[0, 1, 2, 3].index(i) for i in order]
            data = pack_row(batch, index[1])
            assert len(data) == row_bytes(assemble([(batch, index[1])]))
            moved = unpack_row(data, batch.lengths[index[1]], alone[order[0]])
            same = zip(
                row_tensors(moved.cache),
                row_tensors(assemble([(batch, index[1])]).cache),
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in same)
            batch = assemble([(batch, index[0]), (moved, 0), (batch, index[2])])
        tokens = rng.integers(0, 96, len(order)).tolist()
        together = run(model, batch, [[token] for token in tokens])
        for row, i in enumerate(order):
            logits = run(model, alone[i], [[tokens[row]]])
            torch.testing.assert_close(together[row], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case != "Qwen3Next"])
def test_pass_inputs_pads_prompts_so_that_nobody_sees_the_padding(case):
    model, rng = build(case), np.random.default_rng(1)
    texts = [rng.integers(0, 96, length).tolist() for length in (3, 11, 1, 7)]
    rows = Rows.empty(model.config, 4)
    together = run(model, rows, texts)
    assert rows.lengths == [3, 11, 1, 7]
    for row, text in enumerate(texts):
        single = Rows.empty(model.config, 1)
        logits = run(model, single, [text])
        torch.testing.assert_close(together[row], logits[0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(
            row_tensors(assemble([(rows, row)]).cache), row_tensors(single.cache), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
