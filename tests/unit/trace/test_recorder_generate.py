"""Plain ``model.generate`` under the recorder, without one label from the user."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from moe_locality.errors import PlacementError
from moe_locality.placement import solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import DECODE, PREFILL, UNKNOWN, read_trace
from moe_locality.trace.recorder import annotate, attach
from tests.unit.trace.test_recorder_transformers import (
    FAMILIES,
    built,
    gpt_oss,
    mixtral,
    qwen3_moe,
    routers,
    tokens,
)

GENERATORS = [mixtral, qwen3_moe, gpt_oss]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": 99}


def picks(model, sequence):
    """What the routers pick for one sequence run alone and at once: int [S, L, K]."""
    chosen = []
    hooks = [
        router.register_forward_hook(lambda _m, _a, out: chosen.append(out[2].numpy().copy()))
        for router in routers(model)
    ]
    with torch.no_grad():
        model(torch.as_tensor(sequence)[None])
    for hook in hooks:
        hook.remove()
    return np.sort(np.stack(chosen, axis=1), axis=2)


def recorded(trace):
    """Rows of each request, in the order of their ids: (picks, positions, stages)."""
    found = []
    for request in np.unique(trace.request_id):
        mine = trace.filter(requests=[int(request)])
        found.append((np.sort(mine.expert_ids, axis=2), mine.position.tolist(), mine.stage))
    return found


def check(trace, model, sequences, prompts):
    """Each sequence is a request: its own picks, positions from 0, decode after the prompt."""
    requests = recorded(trace)
    assert len(requests) == len(sequences)
    for (ids, positions, stages), sequence, prompt in zip(
        requests, sequences, prompts, strict=True
    ):
        assert positions == list(range(len(sequence)))
        assert stages.tolist() == [PREFILL] * prompt + [DECODE] * (len(sequence) - prompt)
        assert (ids == picks(model, sequence)).all()


def padded(side):
    prompts = tokens(batch=3, length=6)
    mask = torch.ones_like(prompts)
    for row, missing in ((0, 2), (2, 4)):
        mask[row, slice(0, missing) if side == "left" else slice(6 - missing, 6)] = 0
    return prompts * mask, mask


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", GENERATORS, ids=lambda f: f.__name__)
def test_a_row_of_generate_is_a_request(tmp_path, family, cache):
    """Every decoded token was a request of unknown stage and padding was recorded; a row of one
    generate() call is one request, prefill and decode told apart, padding left out [F8]."""
    model = built(family)
    prompts, mask = padded("left")
    options = {**GREEDY, **({"cache_implementation": cache} if cache else {})}
    if cache:
        options["disable_compile"] = True
    with attach(model, tmp_path, strict=True):
        out = model.generate(prompts, attention_mask=mask, **options)
        model.generate(prompts[1:2], **options)  # another call, another request
    assert torch.equal(model.generate(prompts, attention_mask=mask, **options), out)
    rows = [row[row_mask.argmax() : -1] for row, row_mask in zip(out, mask, strict=True)]
    check(read_trace(tmp_path), model, [*rows, rows[1]], [4, 6, 2, 6])


def test_padding_on_the_right_is_left_out(tmp_path):
    """Padding of a plain forward pass was recorded; the attention mask leaves it out [F8]."""
    model = built(mixtral)
    ids, mask = padded("right")
    with attach(model, tmp_path, strict=True), torch.no_grad():
        model(ids, mask)  # positional
    for (found, positions, stages), row, length in zip(
        recorded(read_trace(tmp_path)), ids, mask.sum(1).tolist(), strict=True
    ):
        assert positions == list(range(length))
        assert set(stages.tolist()) == {UNKNOWN}
        assert (found == picks(model, row[:length])).all()


def test_rows_that_ended_are_padding(tmp_path):
    """A row that has ended goes on as padding while others decode; it is no decode row [F8]."""
    model = built(mixtral)
    prompts = tokens(batch=2, length=4)
    first = model.generate(prompts, **{**GREEDY, "max_new_tokens": 8})
    end = int(first[0, 5])
    assert end not in first[1, 4:].tolist()
    assert end not in first[0, 4:5].tolist()
    model.generation_config.eos_token_id = end
    with attach(model, tmp_path, strict=True):
        model.generate(prompts, do_sample=False, max_new_tokens=8)
    check(read_trace(tmp_path), model, [first[0, :6], first[1, :-1]], [4, 4])


@pytest.mark.parametrize("annotated", [False, True])
@pytest.mark.parametrize("beams", [False, True])
def test_samples_and_beams_do_not_lose_the_trace(tmp_path, beams, annotated):
    """Ids of the prompts did not fit the rows of several samples, and the trace was lost; now each
    row is a request, and labels of a prompt hold for all of its rows [F8]."""
    model = built(mixtral)
    options = {"num_beams": 3} if beams else {"do_sample": True, "num_return_sequences": 3}
    options |= {"max_new_tokens": 4, "eos_token_id": 99}
    labels = {"domains": ["code", "law"]} if annotated else {}
    with attach(model, tmp_path, strict=True), annotate(**labels):
        out = model.generate(tokens(batch=2, length=4), **options)
    trace = read_trace(tmp_path)
    requests = recorded(trace)
    assert len(requests) == 6
    for (ids, positions, stages), row in zip(requests, np.repeat(out, 1, axis=0), strict=False):
        assert positions == list(range(7))
        assert stages.tolist() == [PREFILL] * 4 + [DECODE] * 3
        if not beams:
            assert (ids == picks(model, row[:-1])).all()
    if annotated:
        names = [
            trace.domain[trace.filter(requests=[r]).domain_id[0]]
            for r in np.unique(trace.request_id)
        ]
        assert names == ["code"] * 3 + ["law"] * 3


def test_ids_of_prompts_hold_for_their_samples(tmp_path):
    """One id for each prompt with stage "generate" cost every forward pass; it is the id of all
    samples of that prompt [F8]."""
    model = built(mixtral)
    with (
        attach(model, tmp_path, strict=True),
        annotate(request_ids=[10, 20], stage="generate"),
    ):
        model.generate(
            tokens(batch=2, length=4), do_sample=True, num_return_sequences=2, max_new_tokens=3
        )
    trace = read_trace(tmp_path)
    assert np.unique(trace.request_id).tolist() == [10, 20]
    assert trace.num_tokens == 4 * 4 + 4 * 2
    assert (trace.stage == PREFILL).sum() == 16


@pytest.mark.parametrize("assistant", [False, True])
@pytest.mark.parametrize("family", GENERATORS, ids=lambda f: f.__name__)
def test_rejected_drafts_are_not_decoded(tmp_path, family, assistant):
    """Rejected drafts of assisted generation were rows like all others; they are left out, and
    accepted ones are decode rows [F8]."""
    model = built(family)
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6, 7]])
    options = {**GREEDY, "max_new_tokens": 12}
    if assistant:
        torch.manual_seed(3)
        options["assistant_model"] = family().eval()
    else:
        options["prompt_lookup_num_tokens"] = 3
    ran = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, given: ran.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with attach(model, tmp_path, strict=True):
        out = model.generate(prompt, **options)
    hook.remove()
    assert sum(ran) > out.shape[1] - 1  # some drafts were rejected
    check(read_trace(tmp_path), model, [out[0, :-1]], [9])


def test_packed_positions_are_requests(tmp_path):
    """Sequences packed in one row were one request; positions that begin again part them [F8]."""
    model = built(mixtral)
    ids = tokens(batch=1, length=9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    with attach(model, tmp_path, strict=True), torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
    found = [positions for _, positions, _ in recorded(read_trace(tmp_path))]
    assert found == [[0, 1, 2, 3], [0, 1], [0, 1, 2]]


def test_a_loop_by_hand_and_a_chunked_prefill_go_on(tmp_path):
    """Decode steps of a loop by hand were requests of their own; the cache tells whose [F8]."""
    model = built(mixtral)
    ids = tokens(batch=2, length=8)
    with attach(model, tmp_path / "chunks", strict=True), torch.no_grad():
        cache = DynamicCache(config=model.config)
        for part in ids.split(4, dim=1):
            model(part, past_key_values=cache)
    check(read_trace(tmp_path / "chunks"), model, ids, [8, 8])
    with attach(model, tmp_path / "loop", strict=True), torch.no_grad():
        cache = model(ids[:, :6]).past_key_values
        for place in (6, 7):
            cache = model(ids[:, place : place + 1], past_key_values=cache).past_key_values
    for (found, positions, stages), row in zip(
        recorded(read_trace(tmp_path / "loop")), ids, strict=True
    ):
        assert positions == list(range(8))
        assert stages.tolist() == [UNKNOWN] * 6 + [DECODE] * 2
        assert (found == picks(model, row)).all()


def test_labels_of_the_user_win(tmp_path):
    """What annotate() says stands; what it leaves open is found [F8]."""
    model = built(mixtral)
    prompts, mask = padded("left")
    with attach(model, tmp_path, strict=True), annotate(request_ids=[7, 8, 9], stage="unknown"):
        model.generate(prompts, attention_mask=mask, **GREEDY)
    trace = read_trace(tmp_path)
    assert np.unique(trace.request_id).tolist() == [7, 8, 9]
    assert set(trace.stage.tolist()) == {UNKNOWN}
    assert [positions for _, positions, _ in recorded(trace)] == [
        list(range(length)) for length in (8, 10, 6)
    ]


def test_trace_and_plan_carry_name_and_type_of_the_model(tmp_path):
    """RoutingTrace.model was empty for Hugging Face models; it is the name that the model was
    loaded under, else its type, and a name that is given stands [F11]."""
    model = built(FAMILIES[0])
    for folder, name, options, expected in (
        ("type", "", {}, "mixtral"),
        ("path", "org/tiny", {}, "org/tiny"),
        ("given", "org/tiny", {"model": "mine"}, "mine"),
    ):
        model.config.name_or_path = name
        with attach(model, tmp_path / folder, strict=True, **options), torch.no_grad():
            model(tokens())
        trace = read_trace(tmp_path / folder)
        assert (trace.model, trace.model_type) == (expected, "mixtral")
    plan = solve(trace, ClusterTopology.uniform(1, 2), method="linear")
    plan.check_fits(model_type="mixtral")
    plan.check_fits(model_type="")  # a model that has no type
    with pytest.raises(PlacementError, match="found 'mixtral' in the plan, expected 'olmoe'"):
        plan.check_fits(model_type="olmoe")
