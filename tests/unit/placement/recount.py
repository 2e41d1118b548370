"""Costs of a plan from its JSON text and the picks alone: shares no code with the package.

Written from docs: a token is sent once to each other node that serves one of its picks; a replica
on the home rank serves, else one on the home node, else (rule "visited") one on a node that the
token visits anyway, else one on the least loaded node.
"""

import json


def recount(text, tokens, home_of_token=None, served=None):
    """(copies, rank copies, picks) over tokens and layers, [L] node and [L] rank max / mean.

    ``tokens``: per token and layer the list of picks. Without homes: the mean over all homes.
    ``served``: [L][G][E] the rank that serves, where another rule says so.
    """
    plan = json.loads(text)
    ranks, node = plan["num_nodes"] * plan["ranks_per_node"], rank_to_node(plan)
    copies = by_rank = picks = 0
    loads = []
    serve = server(plan, served)
    for layer in range(len(plan["physical_to_logical_map"])):
        load = [0] * ranks
        for token, by_layer in enumerate(tokens):
            homes = range(ranks) if home_of_token is None else [home_of_token[token]]
            for home in homes:
                at = [rank for rank in serve(layer, home, by_layer[layer]) if rank is not None]
                copies += len({node[rank] for rank in at} - {node[home]}) / len(homes)
                by_rank += sum(node[rank] != node[home] for rank in set(at)) / len(homes)
                picks += sum(node[rank] != node[home] for rank in at) / len(homes)
                for rank in at:
                    load[rank] += 1 / len(homes)
        loads.append(load)
    by_node = [
        [sum(load[r] for r in range(ranks) if node[r] == n) for n in range(plan["num_nodes"])]
        for load in loads
    ]
    return copies, by_rank, picks, [peak(some) for some in by_node], [peak(some) for some in loads]


def server(plan, served=None):
    """Who serves: (layer, home rank, picks) -> the rank of each pick, None for no pick.

    ``served`` [L][G][E]: ranks that serve instead of those of the plan's rule.
    """
    rows, node = plan["physical_to_logical_map"], rank_to_node(plan)
    tables = (
        served
        if served is not None
        else [serving(plan, layer, row) for layer, row in enumerate(rows)]
    )
    size = len(rows[0]) // len(node)

    def serve(layer, home, picks):
        table, row, visited, found = tables[layer], rows[layer], {node[home]}, {}
        if served is not None or plan.get("serving_rule", "home") == "home":
            return [None if e < 0 else table[home][e] for e in picks]
        lists = {e: nodes_for(plan, layer, table, home, e) for e in picks if e >= 0}
        for e in sorted(lists, key=lambda e: (len(lists[e]) > 1, e)):
            at = next((n for n in lists[e] if n in visited), lists[e][0])
            if len(lists[e]) == 1:
                visited |= {lists[f][0] for f in lists if len(lists[f]) == 1}
            visited.add(at)
            there = [s // size for s, held in enumerate(row) if held == e]
            there = [rank for rank in there if node[rank] == at]
            found[e] = table[home][e] if table[home][e] in there else there[node[home] % len(there)]
        return [found.get(e) for e in picks]

    return serve


def nodes_for(plan, layer, table, home, e):
    """The nodes that may serve an expert for a home rank, the preferred one first."""
    row, node = plan["physical_to_logical_map"][layer], rank_to_node(plan)
    size, nodes = len(row) // len(node), plan["num_nodes"]
    holders = {}
    for slot, held in enumerate(row):
        holders.setdefault(held, set()).add(node[slot // size])
    if node[home] in holders[e]:
        return [node[home]]
    first = node[table[home][e]]
    if plan.get("serving_nodes") is None or len(holders[e]) == 1:
        return [first, *sorted(holders[e] - {first})]
    several = sorted(x for x in holders if x >= 0 and len(holders[x]) > 1)  # -1: an empty slot
    flat = plan["serving_nodes"][layer]
    width = len(flat) // (len(several) * nodes)
    start = (several.index(e) * nodes + node[home]) * width
    return [n for n in flat[start : start + width] if n >= 0]


def peak(loads):
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1


def rank_to_node(plan):
    count = plan["num_nodes"] * plan["ranks_per_node"]
    return plan.get("rank_to_node", [rank // plan["ranks_per_node"] for rank in range(count)])


def serving(plan, layer, row):
    """[G][E] the rank that serves each expert for each home rank."""
    nodes, experts = range(plan["num_nodes"]), range(plan["num_experts"])
    node = rank_to_node(plan)
    ranks = range(len(node))
    size = len(row) // len(ranks)
    on = {e: [slot // size for slot, held in enumerate(row) if held == e] for e in experts}
    holders = {e: sorted({node[rank] for rank in on[e]}) for e in experts}
    load = (plan.get("expert_load") or [[]] * (layer + 1))[layer]
    load = load if load and any(load) else [1] * len(experts)
    falling = sorted(experts, key=lambda e: (-load[e], e))
    node_load = [0] * len(nodes)
    for e in experts:
        for n in holders[e]:
            node_load[n] += load[e] * (len(nodes) if len(holders[e]) == 1 else 1)
    goes = {(n, e): n if n in holders[e] else holders[e][0] for n in nodes for e in experts}
    for e in (e for e in falling if len(holders[e]) > 1):
        for n in (n for n in nodes if n not in holders[e]):
            goes[n, e] = min(holders[e], key=lambda m: (node_load[m], m))
            node_load[goes[n, e]] += load[e]
    table = [[-1] * len(experts) for _ in ranks]
    rank_load = [0] * len(ranks)
    for g in ranks:
        for e in experts:
            near = [rank for rank in on[e] if node[rank] == goes[node[g], e]]
            if g in near or len(near) == 1:
                table[g][e] = g if g in near else near[0]
                rank_load[table[g][e]] += load[e]
    for e in falling:
        for n in nodes:
            near = [rank for rank in on[e] if node[rank] == goes[n, e]]
            homes = [g for g in ranks if node[g] == n and table[g][e] < 0]
            together = [homes] if goes[n, e] != n else [[g] for g in homes]
            for some in (some for some in together if some):
                best = min(near, key=lambda rank: (rank_load[rank], on[e].index(rank)))
                rank_load[best] += load[e] * len(some)
                for g in some:
                    table[g][e] = best
    return table
