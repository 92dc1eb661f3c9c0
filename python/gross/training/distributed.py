"""One training on many processes: what ``torchrun`` starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import Shard


def running() -> bool:
    return dist.is_available() and dist.is_initialized()


def first_process() -> bool:
    """Whether this is the one process that writes and prints, of those that ``torchrun``
    started."""
    return int(os.environ.get("RANK", "0")) == 0


def shard() -> Shard:
    """This process's part of a batch."""
    return Shard(dist.get_rank(), dist.get_world_size()) if running() else Shard()


def wait() -> None:
    """Until every process is here."""
    if running():
        dist.barrier()


@contextmanager
def launched(device: torch.device) -> Iterator[torch.device]:
    """Within, the processes that ``torchrun`` started are one group: gloo on CPUs, nccl on GPUs.

    Yields this process's device. Outside of ``torchrun`` nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or running():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """The model that averages gradients over the processes; the model itself where there is one.

    Inactive terms get gradients of zeros from the kernels, so every parameter is always used."""
    if not running():
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def agree(loss: Tensor, stop: bool) -> Tensor:
    """The mean of a float64 loss over the processes, and how many were asked to stop: the same on
    all of them, as two numbers where the loss is."""
    values = torch.stack([loss, torch.full_like(loss, stop)])
    if running():
        dist.all_reduce(values)
        values[0] /= dist.get_world_size()
    return values
