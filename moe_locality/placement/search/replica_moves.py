"""Compiled search over the nodes that hold each expert, replicas included, on exact copies.

The state of one layer: which node holds which expert (``held`` [M, E]), which node serves expert e
for homes on node m (``served``, the rule of ``choose_serving_nodes``, run again after every
change), and the set of experts that each node serves for each home (``sets``, bits). Copies are the
tokens of a home that meet the set of another node. Taking expert e out of a set, or putting it in,
changes them by the tokens that pick e and nothing else of the set: one pass over the tokens of e.

All numbers are integers, so a seed gives the same result everywhere. Shapes: N (token pattern,
pick) pairs, W words per token, E experts, M nodes, H home groups (1: homes are uniform);
``load`` [E] int64; ``order`` [E]: experts by falling load, equal loads by number.
"""

import numpy as np

from moe_locality.placement.count_kernels import compiled
from moe_locality.placement.search.swaps import metropolis_loss, next_random, priced_highest


@compiled
def serve(held, load, order, served):
    """Fill served [M, E] int64: the node that serves each expert for homes on each node."""
    copies_of = held.sum(axis=0)
    node_load = sure_loads(held, load, copies_of)
    for e in range(len(load)):
        _serve_sure(held, copies_of, e, served)
    for e in order:
        if 1 < copies_of[e] < len(held):
            _serve_shared(held, load, e, served, node_load)


@compiled
def serve_changed(held, load, order, copies_of, base, e, f, served, node_load, some):
    """``serve`` where only the nodes that hold e and f have changed.

    ``base`` [M]: the ``sure_loads``. ``some`` [E] is filled from the left with the experts that may
    be served otherwise than before; returns how many.
    """
    nodes, count = len(base), 0
    for x in (e, f):
        _serve_sure(held, copies_of, x, served)
        if not 1 < copies_of[x] < nodes:
            some[count] = x
            count += 1
    node_load[:] = base
    for x in order:
        if 1 < copies_of[x] < nodes:
            _serve_shared(held, load, x, served, node_load)
            some[count] = x
            count += 1
    return count


@compiled
def sure_loads(held, load, copies_of):
    """[M] int64 what the nodes serve before any replica is chosen; ``hold`` keeps it up to date."""
    base = np.zeros(len(held), dtype=np.int64)
    for e in range(len(load)):
        hold(held, load, copies_of, base, e, 1)
    return base


@compiled
def hold(held, load, copies_of, base, e, sign):
    """Add to base [M] what expert e loads its nodes with, or take it away (``sign`` -1)."""
    nodes = len(base)
    for n in range(nodes):
        if held[n, e]:
            base[n] += sign * load[e] * (nodes if copies_of[e] == 1 else 1)


@compiled
def _serve_sure(held, copies_of, e, served):
    """Homes on nodes that hold e, and all of them where one node does."""
    for n in range(len(held)):
        if held[n, e]:
            served[n, e] = n
            if copies_of[e] == 1:
                served[:, e] = n


@compiled
def _serve_shared(held, load, e, served, node_load):
    """Homes on the other nodes: each at the node with e that has the least load so far."""
    for home in range(len(held)):
        if held[home, e]:
            continue
        best = -1
        for n in range(len(held)):
            if held[n, e] and (best < 0 or node_load[n] < node_load[best]):
                best = n
        served[home, e] = best
        node_load[best] += load[e]


@compiled
def load_above(served, picks, cap):
    """Picks above the cap, summed over the nodes; picks [M, E] are those of homes on each node."""
    nodes, experts = served.shape
    node_load = np.zeros(nodes)
    for home in range(nodes):
        for e in range(experts):
            node_load[served[home, e]] += picks[home, e]
    above = 0.0
    for n in range(nodes):
        above += max(node_load[n] - cap, 0.0)
    return above


_PATIENCE = 48
"""Recounted candidates in a row without a better one: the bounds are loose with many nodes."""

_HOPE = 6.0
"""Heats: a step that brings too much load is undone before its copies are counted, unless it would
be kept for a saving of fewer copies than this."""


@compiled
def _alone(words, weight, start, stop, others):
    """Weight of the tokens start .. stop that pick none of the experts in ``others`` [W].

    Plain loops over whole slices: with one word or four these become vector instructions.
    """
    size, part, total = words.shape[0], weight[start:stop], np.int64(0)
    if size == 1:
        row, bits = words[0, start:stop], others[0]
        for i in range(len(row)):
            if row[i] & bits == 0:
                total += part[i]
    elif size == 4:
        first, second = words[0, start:stop], words[1, start:stop]
        third, fourth = words[2, start:stop], words[3, start:stop]
        one, two, three, four = others[0], others[1], others[2], others[3]
        for i in range(len(first)):
            if first[i] & one | second[i] & two | third[i] & three | fourth[i] & four == 0:
                total += part[i]
    else:
        for i in range(start, stop):
            met = words[0, i] & others[0]
            for w in range(1, size):
                met |= words[w, i] & others[w]
            if met == 0:
                total += weight[i]
    return total


@compiled
def reroute(words, weight, first, bit, served, target, sets, some):
    """Bring ``sets`` from served to target (both [M, E]), which differ for experts among ``some``
    at most; return the change of copies.
    """
    size = words.shape[0]
    change = np.int64(0)
    for e in some:
        for home in range(len(served)):
            old, new = served[home, e], target[home, e]
            if old == new:
                continue
            row = home % first.shape[0]
            start, stop = first[row, e], first[row, e + 1]
            if old >= 0 and old != home:
                for w in range(size):
                    sets[home, old, w] ^= bit[e, w]
                change -= _alone(words, weight, start, stop, sets[home, old])
            if new != home:
                change += _alone(words, weight, start, stop, sets[home, new])
                for w in range(size):
                    sets[home, new, w] ^= bit[e, w]
    return change


@compiled
def lonely(words, weight, first, bit, served, sets, home, gain):
    """Fill gain [E]: copies of a home that e alone causes."""
    others = np.empty(words.shape[0], dtype=words.dtype)
    row = home % first.shape[0]
    for e in range(served.shape[1]):
        gain[e] = 0
        if served[home, e] != home:
            for w in range(len(others)):
                others[w] = sets[home, served[home, e], w] ^ bit[e, w]
            gain[e] = _alone(words, weight, first[row, e], first[row, e + 1], others)


@compiled
def add_greedily(words, weight, first, bit, load, order, picks, cap, held, room):
    """Fill the room [M] of the nodes, each time with the replica that saves most copies; returns
    (served [M, E], sets [M, M, W], copies before, copies after).

    Lazy: a replica of e saves at most the copies that e alone causes, over all homes, as long as
    only e is rerouted; candidates are recounted in falling order of that bound, under the true
    serving rule, until none left can win or ``_PATIENCE`` in a row did not. What brings more load
    above the cap loses against everything that does not.
    """
    nodes, experts = held.shape
    served = np.full((nodes, experts), -1, dtype=np.int64)
    target = served.copy()
    sets = np.zeros((nodes, nodes, words.shape[0]), dtype=words.dtype)
    serve(held, load, order, target)
    everything = np.arange(experts)
    start = reroute(words, weight, first, bit, served, target, sets, everything)
    served[:] = target
    copies, above = start, load_above(served, picks, cap)
    gain = np.zeros((nodes, experts), dtype=np.int64)
    for home in range(nodes):
        lonely(words, weight, first, bit, served, sets, home, gain[home])
    trial = sets.copy()
    bound = np.empty(nodes * experts, dtype=np.int64)
    while room.sum() > 0:
        for e in range(experts):
            most = gain[:, e].sum()
            for n in range(nodes):
                bound[n * experts + e] = most if room[n] > 0 and not held[n, e] else -1
        best, best_above, best_change, idle = -1, 0.0, np.int64(0), 0
        for place in np.argsort(-bound, kind="mergesort"):
            if bound[place] < 0 or (best_above <= 0 and best >= 0 and -best_change >= bound[place]):
                break
            idle += 1
            if idle > _PATIENCE and best >= 0 and best_above <= 0:
                break
            n, e = place // experts, place % experts
            held[n, e] = True
            serve(held, load, order, target)
            held[n, e] = False
            more = max(load_above(target, picks, cap) - above, 0.0)
            if best >= 0 and more > best_above:
                continue
            trial[:] = sets
            change = reroute(words, weight, first, bit, served, target, trial, everything)
            if best < 0 or more < best_above or change < best_change:
                best, best_above, best_change, idle = place, more, change, 0
        n, e = best // experts, best % experts
        held[n, e] = True
        room[n] -= 1
        serve(held, load, order, target)
        copies += reroute(words, weight, first, bit, served, target, sets, everything)
        for home in range(nodes):
            if (served[home] != target[home]).any():
                served[home] = target[home]
                lonely(words, weight, first, bit, served, sets, home, gain[home])
        above = load_above(served, picks, cap)
    return served, sets, start, copies


@compiled
def _rerouted(served, target, part, some, changed, share):
    """Fill changed [E] with those of ``some`` experts that are served otherwise in target, and
    share [M, E] with what each node's share of their picks grows by, both from the left; return how
    many they are.
    """
    count = 0
    for e in some:
        first = True
        for home in range(len(served)):
            old, new = served[home, e], target[home, e]
            if old == new:
                continue
            if first:
                changed[count] = e
                share[:, count] = 0.0
                count += 1
                first = False
            if old >= 0:
                share[old, count - 1] -= part[home, e]
            share[new, count - 1] += part[home, e]
    return count


@compiled
def _loads_after(cov, picks, near, node_load, variance, changed, share, count, new_load, new_var):
    """Loads and variances of the nodes once the shares of some experts have changed."""
    for n in range(len(node_load)):
        load, var = node_load[n], variance[n]
        for i in range(count):
            e, grown = changed[i], share[n, i]
            if grown == 0:
                continue
            load += grown * picks[e]
            if len(cov):
                inner = 2 * near[n, e]
                for j in range(count):
                    inner += share[n, j] * cov[e, changed[j]]
                var += grown * inner
        new_load[n], new_var[n] = load, var


@compiled
def _loads_of(cov, picks, served, part):
    """([M, E] covariance of each expert with each node, [M] loads, [M] variances)."""
    nodes, experts = served.shape
    near, none = np.zeros((nodes, len(cov))), np.zeros(nodes)
    load, var = np.zeros(nodes), np.zeros(nodes)
    changed, share = np.empty(experts, np.int64), np.empty((nodes, experts))
    count = _rerouted(np.full_like(served, -1), served, part, np.arange(experts), changed, share)
    _loads_after(cov, picks, near, none, none, changed, share, count, load, var)
    _follow(cov, near, changed, share, count)
    return near, load, var


@compiled
def _level(load, variance, unit, limit, draws, deviation, room):
    """Expected load of the busiest node; beyond the limit it counts ``STEEP`` times more."""
    for n in range(len(load)):
        deviation[n] = unit * np.sqrt(max(variance[n], 0.0))
    return priced_highest(load, deviation, draws, room, limit)


@compiled
def anneal(
    words, weight, first, bit, load, order, picks, held, served, sets,
    steps, hot, cold, price, limit, cov, unit, draws, seed,
):  # fmt: skip
    """Simulated annealing over exchanges of experts between nodes and changes of replicas.

    A step puts expert f in the place of e on node a; where e would have no node left, or half of
    the time, e takes the place of f on a node b. Cost = copies + price * expected load of the
    busiest node (``cov``, ``unit``, ``draws`` as in ``anneal`` of experts without replicas); load
    above the ``limit`` costs ``swaps.STEEP`` times more. The state arguments are changed. A step
    that costs more than the temperature allows (``hot`` down to ``cold``, in copies) is undone.
    Returns held [M, E] of the state met that costs least, and its copies less those of the start.
    """
    nodes, experts = held.shape
    state = np.array([np.uint64(seed)])
    copies_of = held.sum(axis=0)
    target, trial, room = served.copy(), sets.copy(), np.empty(draws.shape[1])
    of_expert = picks.sum(axis=0)
    part = picks / np.maximum(of_expert, 1e-9)
    changed, share = np.empty(experts, np.int64), np.empty((nodes, experts))
    near, node_load, variance = _loads_of(cov, of_expert, served, part)
    deviation, new_load, new_var = np.zeros(nodes), np.zeros(nodes), np.zeros(nodes)
    level = _level(node_load, variance, unit, limit, draws, deviation, room)
    base, whole = sure_loads(held, load, copies_of), np.empty(nodes, np.int64)
    some = np.empty(experts, np.int64)
    total = np.int64(0)
    best, least, best_total = held.copy(), price * level, total
    for step in range(steps):
        temperature = hot * (cold / hot) ** (step / steps)
        a, e, b, f = propose(held, copies_of, state)
        if a < 0:
            continue
        _change(held, load, copies_of, base, a, e, b, f)
        these = some[: serve_changed(held, load, order, copies_of, base, e, f, target, whole, some)]
        count = _rerouted(served, target, part, these, changed, share)
        _loads_after(
            cov, of_expert, near, node_load, variance, changed, share, count, new_load, new_var
        )
        now = _level(new_load, new_var, unit, limit, draws, deviation, room)
        allowed = temperature * metropolis_loss(state) - price * (now - level)
        change = np.int64(0)
        hopeful = allowed > -_HOPE * temperature
        if hopeful:
            trial[:] = sets
            change = reroute(words, weight, first, bit, served, target, trial, changed[:count])
        if hopeful and change <= allowed:
            _copy_columns(target, served, changed[:count])
            sets[:] = trial
            node_load[:], variance[:] = new_load, new_var
            _follow(cov, near, changed, share, count)
            total, level = total + change, now
            if total + price * level < least:
                best[:] = held
                least, best_total = total + price * level, total
        else:
            _change(held, load, copies_of, base, a, f, b, e)
            _copy_columns(served, target, changed[:count])
    return best, best_total


@compiled
def _copy_columns(source, into, some):
    for x in some:
        into[:, x] = source[:, x]


@compiled
def propose(held, copies_of, state):
    """(a, e, b, f): put expert f in the place of e on node a and, where b >= 0, e in the place of f
    on node b; a is -1 where the draw is no change.
    """
    nodes, experts = held.shape
    a, e = next_random(state) % nodes, next_random(state) % experts
    f = next_random(state) % experts
    while not held[a, e]:
        e = next_random(state) % experts
    if held[a, f]:
        return -1, e, -1, f
    b = -1
    if copies_of[e] == 1 or next_random(state) % 2 == 0:
        b = next_random(state) % nodes
        while not held[b, f]:
            b = next_random(state) % nodes
        if held[b, e]:
            return -1, e, -1, f
    return a, e, b, f


@compiled
def put(held, a, e, b, f):
    """Put f in the place of e on node a and, where b >= 0, e in the place of f on node b."""
    held[a, e], held[a, f] = False, True
    if b >= 0:
        held[b, f], held[b, e] = False, True


@compiled
def _change(held, load, copies_of, base, a, e, b, f):
    """``put``, with the numbers of copies and the ``sure_loads``."""
    hold(held, load, copies_of, base, e, -1)
    hold(held, load, copies_of, base, f, -1)
    put(held, a, e, b, f)
    if b < 0:
        copies_of[e] -= 1
        copies_of[f] += 1
    hold(held, load, copies_of, base, e, 1)
    hold(held, load, copies_of, base, f, 1)


@compiled
def _follow(cov, near, changed, share, count):
    """Bring near [M, E], the covariance of each expert with each node, to the changed shares."""
    for n in range(len(near)):
        for i in range(count):
            if len(cov) and share[n, i] != 0:
                near[n] += share[n, i] * cov[changed[i]]
