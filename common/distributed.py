"""What the processes of a job say to each other besides gradients.

Talk between hosts (who stopped, where a run lies, which rows were read) goes through a gloo group of its
own: it must not wait for what is queued on a GPU, and takes plain Python values.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

HOST_TIMEOUT = timedelta(hours=2)
"""The longest that ranks wait for rank 0 alone: training a tokenizer, verifying or consolidating a large
checkpoint on a slow disk."""

LAST_WORDS_SECONDS = 5.0
"""How long a rank that lost its peers waits to hear which of them failed."""


class Job:
    """The processes that train together; with one of them it does nothing.

    Args:
        group: of gloo, with all ranks; None for a process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank: int = 0 if group is None else dist.get_rank()
        self.world_size: int = 1 if group is None else dist.get_world_size()

    @classmethod
    def of_all(cls) -> "Job":
        """All ranks, with a new group, which every rank must make at the same point.

        A thread needs a group of its own: collectives of two threads in one would mix.
        """
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) if together else None)

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value in the order of ranks, on rank 0; elsewhere an empty list."""
        if self.group is None:
            return [value]
        box: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, box, dst=0, group=self.group)
        return box or []

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.group is not None:
            dist.barrier(group=self.group)

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """A block that rank 0 goes through before the others: what it caches or writes, they find."""
        if self.rank != 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place and in the stream of the tensor's device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def every(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked: (world size, …)."""
        if self.world_size == 1:
            return tensor[None]
        stacked = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(stacked, tensor)
        return torch.stack(stacked)


def tell_failure(error: BaseException) -> bool:
    """Leave word for the other ranks that this one failed, and why; see :func:`lost_to`.

    Returns:
        Whether that is news: False when another rank has said the very same before, or rank 0, which keeps
        what is said, has failed and said so itself.
    """
    store = _store()
    if store is None:
        return True
    reason = f"{type(error).__name__}: {error}"
    try:
        first = store.compare_set("failure", "", f"rank {dist.get_rank()}: {reason}").decode(errors="replace")
    except Exception:  # the store is gone, and rank 0 with it
        return False
    return bool(first == f"rank {dist.get_rank()}: {reason}" or not first.endswith(f": {reason}"))


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    if not (dist.is_available() and dist.is_initialized()) or not isinstance(error, RuntimeError):
        return False
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Socket", "Broken pipe", "gloo", "NCCL")
    return isinstance(error, kinds) or any(sign in text for sign in signs)


def lost_to() -> str | None:
    """Which rank failed first and why, as far as it has been told: ``rank 3: ValueError: …``."""
    store = _store()
    end = time.monotonic() + LAST_WORDS_SECONDS
    while store is not None and time.monotonic() < end:
        try:
            if store.check(["failure"]):
                return store.get("failure").decode(errors="replace")
        except Exception:
            time.sleep(1)  # rank 0 speaks for itself; let it do so first
            return "rank 0 ended, see its error above"
        time.sleep(0.1)
    return None


def _store() -> Any:
    """The key-value store that the ranks met at; rank 0 keeps it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
