"""Which prompts are answered together: planned before a run and kept, for the company decides near-ties.

A matrix product of 15 rows rounds otherwise than one of 16. Where two tokens are all but equally likely, that decides
between them, and the answer goes another way from there. So a run that is resumed uses the batches it began with.

Shapes: B batch, T sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor

from scoring.requests import Key, Request

LEAST_PREFIX = 32
"""Tokens that prompts must share for it to be worth computing them apart."""


@dataclass(frozen=True)
class Batch:
    """Prompts of one task that are answered together."""

    task: str
    rows: tuple[int, ...]
    prefix: int
    """Tokens that all of them begin with and that are computed once for the task; 0: none."""

    @property
    def keys(self) -> list[Key]:
        """Of its requests."""
        return [(self.task, row) for row in self.rows]


Plan = list[Batch]


def make_plan(
    requests: Sequence[Request], ids: Mapping[Key, list[int]], batch_size: int, limit: int, share: bool = True
) -> Plan:
    """Batches of a task's prompts of like length, the longest first: what does not fit the memory shows at once.

    Args:
        requests: with distinct keys; tasks are answered in the order in which they first come.
        ids: each prompt's tokens, at least one.
        batch_size: the most prompts in a batch.
        limit: tokens that longer prompts were cut to, from the left.
        share: whether what a task's prompts begin with may be computed once.
    """
    tasks: dict[str, list[Request]] = {}
    for request in requests:
        tasks.setdefault(request.task, []).append(request)
    return [batch for task in tasks.values() for batch in _plan_task(task, ids, batch_size, limit, share)]


def _plan_task(requests: list[Request], ids: Mapping[Key, list[int]], batch_size: int, limit: int, share: bool) -> Plan:
    # Prompts that were cut have lost the beginning that the others share.
    whole = [ids[request.key] for request in requests if len(ids[request.key]) < limit]
    common = common_prefix(whole) if share and len(whole) > 1 else []

    def group(request: Request) -> tuple[bool, int]:
        return ids[request.key][: len(common)] == common, request.max_new_tokens

    plan: Plan = []
    order = sorted(requests, key=lambda request: (*group(request), -len(ids[request.key]), request.row))
    for (shares, _), members in groupby(order, group):
        rows = [request.row for request in members]
        parts = [tuple(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        plan += [Batch(requests[0].task, part, len(common) if shares else 0) for part in parts]
    return plan


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The tokens that all rows begin with, one less than the shortest row at most; none when it is not worth it."""
    first, last = min(rows), max(rows)  # in their order, these two share the least
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    shared = min(shared, min(map(len, rows)) - 1)
    return first[:shared] if shared >= LEAST_PREFIX else []


def to_json(plan: Plan) -> list[dict[str, Any]]:
    """A plan as plain values."""
    return [asdict(batch) | {"rows": list(batch.rows)} for batch in plan]


def from_json(values: list[dict[str, Any]]) -> Plan:
    """The inverse of :func:`to_json`."""
    return [Batch(value["task"], tuple(value["rows"]), value["prefix"]) for value in values]


def pad_left(rows: Sequence[Sequence[int]], filling: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T) that end together, and the mask (B, T), 1 where they are and 0 where ``filling`` is."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[filling] * (width - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BT, mask_BT
