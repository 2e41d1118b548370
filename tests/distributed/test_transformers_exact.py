"""transformers models through our exchange on other numbers of nodes, and where greedy texts part
from those of the unsplit model.
"""

import pytest
import torch

from tests.distributed.test_transformers_ep import (
    CASES,
    compare_with_whole,
    placed,
    save_tiny,
    transformers,
)
from tests.launch import run_ranks

ROUNDING = 1e-4
"""Two logits of a tiny model as close as this may change places where sums have another order."""


@pytest.mark.parametrize(
    ("world", "num_nodes"),
    [(2, 2), *(pytest.param(4, nodes, marks=pytest.mark.slow) for nodes in (4, 1))],
)
def test_apply_equals_the_whole_model_on_other_nodes(tmp_path, world, num_nodes):
    path = save_tiny(tmp_path, "Qwen3Moe")
    run_ranks(compare_with_whole, world, path, CASES, num_nodes, timeout_s=240.0)


def decode(rank, world, path, length):
    """Greedy texts, and the gap between the two best logits at each token, by plan."""
    prompts = torch.randint(0, 96, (16, 6), generator=torch.Generator().manual_seed(rank))
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    found = {}
    for kind in ("whole", "moved", "copied"):
        if kind == "whole":
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        else:
            model = placed(path, world, kind, "hierarchical")[0]
        made = model.eval().generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        best = torch.stack(made.logits, dim=1).topk(2).values
        found[kind] = made.sequences[:, 6:].numpy(), (best[..., 0] - best[..., 1]).numpy()
    return found


@pytest.mark.parametrize("family", ["Qwen3Moe", pytest.param("DeepseekV3", marks=pytest.mark.slow)])
def test_generate_parts_from_the_whole_model_at_ties_only(tmp_path, record_property, family):
    """Counted up to the first other token of a text: what follows has another beginning."""
    everyone = run_ranks(decode, 4, save_tiny(tmp_path, family), 32, timeout_s=240.0)
    for kind in ("moved", "copied"):
        compared, gaps = 0, []
        for found in everyone:
            texts, leads = found["whole"]
            for text, other, gap in zip(texts, found[kind][0], leads, strict=True):
                parted = (text != other).nonzero()[0]
                compared += int(parted[0]) + 1 if len(parted) else len(text)
                gaps += [float(gap[at]) for at in parted[:1]]
        record_property(f"{kind}: tokens compared, parted at gaps", f"{compared}, {gaps}")
        assert max(gaps, default=0.0) <= ROUNDING, f"{kind}: parted at gaps {gaps}"
        assert len(gaps) <= compared // 1000, f"{kind}: {len(gaps)} of {compared} tokens parted"
