"""Requests cut from the text of ``sources``: byte tokens, a split by document, batches per rank.

A request is one sequence. Its ``request_id`` is unique over both splits and the same on every rank
and in every run with the same seed. All ranks draw the same global batch of a step; a map of homes
only decides which rank computes which request, so it changes traffic and not the training data.

Shapes: N requests, S tokens of a sequence, G ranks.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .sources import DOMAINS, read_documents

VOCAB_SIZE = 258
BEGIN, END = 256, 257
"""Bytes are tokens 0 to 255; a document starts with BEGIN and stops with END."""

HELD_OUT_FRACTION = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Sequences of one split."""

    tokens: np.ndarray
    """int16 [N, S + 1]: input is ``[:, :-1]``, target is ``[:, 1:]``"""
    request_id: np.ndarray
    """int64 [N]"""
    domain_id: np.ndarray
    """int32 [N], index into ``domains``"""
    domains: tuple[str, ...] = DOMAINS

    def __len__(self) -> int:
        return len(self.request_id)

    def take(self, rows: np.ndarray | slice) -> "Requests":
        """Return some of the requests, in the order given."""
        return Requests(
            tokens=self.tokens[rows],
            request_id=self.request_id[rows],
            domain_id=self.domain_id[rows],
            domains=self.domains,
        )

    def domain_names(self) -> list[str]:
        return [self.domains[d] for d in self.domain_id]


def build_requests(
    *, seq_len: int, train_per_domain: int, held_out_per_domain: int, seed: int = 0
) -> tuple[Requests, Requests]:
    """Return the (train, held-out) requests: as many of each domain, no document in both.

    Requests are ordered domain by domain in turn, so any run of consecutive requests is balanced.

    Raises:
        ValueError: the text does not suffice for that many sequences.
    """
    train, held_out = [], []
    for domain in DOMAINS:
        parts = split_documents(domain, seed)
        train.append(_cut(parts[0], seq_len, train_per_domain, domain, "train", seed))
        held_out.append(_cut(parts[1], seq_len, held_out_per_domain, domain, "held-out", seed))
    first = len(DOMAINS) * train_per_domain
    return _interleave(train, first_id=0), _interleave(held_out, first_id=first)


def split_documents(domain: str, seed: int) -> tuple[list[str], list[str]]:
    """Split the documents of a domain into (train, held-out), about four to one by length."""
    documents = read_documents(domain, seed)
    random.Random(f"{seed}/{domain}").shuffle(documents)
    wanted, held_out = HELD_OUT_FRACTION * sum(map(len, documents)), 0
    for count, document in enumerate(documents):
        held_out += len(document)
        if held_out >= wanted:
            return documents[count + 1 :], documents[: count + 1]
    raise ValueError(f"domain {domain!r} has too few documents to hold some out")


def encode(document: str) -> np.ndarray:
    """Return the byte tokens [tokens] int16 of a document between BEGIN and END."""
    text = np.frombuffer(document.encode("utf-8"), dtype=np.uint8)
    return np.concatenate([[BEGIN], text, [END]]).astype(np.int16)


def _cut(documents, seq_len, count, domain, split, seed) -> np.ndarray:
    """Cut sequences [count, S + 1] out of all the documents, none overlapping."""
    windows = []
    for document in documents:
        tokens = encode(document)
        full = (len(tokens) - 1) // seq_len
        windows.extend(tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(full))
    if len(windows) < count:
        raise ValueError(
            f"the {split} text of domain {domain!r} gives {len(windows)} sequences of {seq_len}"
            f" tokens, {count} were asked for: ask for fewer or shorter ones"
        )
    return np.stack(random.Random(f"{seed}/{domain}/{split}").sample(windows, count))


def _interleave(by_domain: list[np.ndarray], first_id: int) -> Requests:
    tokens = np.stack(by_domain, axis=1)
    count = tokens.shape[0] * tokens.shape[1]
    return Requests(
        tokens=tokens.reshape(count, tokens.shape[2]),
        request_id=first_id + np.arange(count, dtype=np.int64),
        domain_id=np.tile(np.arange(len(by_domain), dtype=np.int32), tokens.shape[0]),
    )


def assign_ranks(
    request_ids: np.ndarray, num_ranks: int, homes: Mapping[int, int] | None = None
) -> np.ndarray:
    """Return the rank [N] that computes each request: its home where there is room, else another.

    Every rank gets the same number, so N must be a multiple of ``num_ranks``. Without homes, or for
    requests without one, ranks are dealt in turn. Where more requests have their home on a rank
    than it can take, the later ones go to ranks with room.

    Raises:
        ValueError: N is not a multiple, or a home is not a rank of this run.
    """
    count = len(request_ids)
    if count % num_ranks:
        raise ValueError(
            f"{count} requests cannot be dealt to {num_ranks} ranks in equal numbers: use a"
            " multiple"
        )
    # each deal starts one rank later, so the order of the domains cannot line up with the ranks
    deal, place = np.divmod(np.arange(count), num_ranks)
    ranks = (deal + place) % num_ranks
    if homes is None:
        return ranks.astype(np.int32)
    wanted = np.array([homes.get(int(request), -1) for request in request_ids], dtype=np.int64)
    if wanted.max(initial=-1) >= num_ranks or wanted.min(initial=0) < -1:
        raise ValueError(
            f"a request has its home on rank {wanted.max()}, this run has {num_ranks} ranks: make"
            " the homes for as many ranks"
        )
    return _keep_homes(wanted, ranks, num_ranks)


def _keep_homes(wanted: np.ndarray, dealt: np.ndarray, num_ranks: int) -> np.ndarray:
    room = np.full(num_ranks, len(wanted) // num_ranks)
    ranks = np.full(len(wanted), -1, dtype=np.int32)
    for i, home in enumerate(wanted):
        if home >= 0 and room[home]:
            ranks[i], room[home] = home, room[home] - 1
    for i in np.flatnonzero(ranks < 0):
        rank = dealt[i] if room[dealt[i]] else int(room.argmax())
        ranks[i], room[rank] = rank, room[rank] - 1
    return ranks


def train_batches(
    requests: Requests,
    *,
    rank: int,
    num_ranks: int,
    per_rank: int,
    steps: int,
    seed: int = 0,
    homes: Mapping[int, int] | None = None,
) -> Iterator[Requests]:
    """Yield this rank's ``per_rank`` requests of each step.

    The global batch of a step is the same with and without homes. Every epoch is shuffled in blocks
    of one request per domain, so each global batch keeps the mix of domains.
    """
    blocks = np.arange(len(requests)).reshape(-1, len(requests.domains))
    size = per_rank * num_ranks
    if size > len(requests):
        raise ValueError(
            f"a global batch takes {size} requests, the split has {len(requests)}: use a smaller"
            " batch"
        )
    order, epoch = np.empty(0, dtype=np.int64), 0
    for _ in range(steps):
        while len(order) < size:
            shuffled = np.random.default_rng([seed, epoch]).permutation(len(blocks))
            order, epoch = np.concatenate([order, blocks[shuffled].ravel()]), epoch + 1
        batch, order = order[:size], order[size:]
        ranks = assign_ranks(requests.request_id[batch], num_ranks, homes)
        yield requests.take(batch[ranks == rank])


def eval_batches(
    requests: Requests,
    *,
    rank: int,
    num_ranks: int,
    per_rank: int,
    homes: Mapping[int, int] | None = None,
) -> Iterator[Requests]:
    """Yield this rank's share of a split once; as many batches on every rank."""
    mine = np.flatnonzero(assign_ranks(requests.request_id, num_ranks, homes) == rank)
    for start in range(0, len(mine), per_rank):
        yield requests.take(mine[start : start + per_rank])


def read_homes(path: str | Path) -> dict[int, int]:
    """Read a JSON object that maps request ids to ranks, as ``moe-locality group`` writes it.

    Raises:
        ValueError: the file is not such an object.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("homes"), dict):
        content = content["homes"]
    try:
        return {int(request): int(rank) for request, rank in content.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path} does not map request ids to ranks: expected a JSON object such as {{"17": 3}}'
        ) from error
