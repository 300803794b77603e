"""Rendezvous of the workers: environment variables with the address, and a store in which each worker registers."""

import contextlib
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not for mypy

from moreh.errors import OptionError, WorkerError
from moreh.patches.world_variables import REQUIRED, variables

# How long workers wait for each other, and when they say so.
RENDEZVOUS_TIMEOUT_S = 600.0
WARNING_AFTER_S = 60.0
# How long rank 0 lives on for workers that are behind it. One that was killed never comes.
ENDING_S = 60.0


@dataclass(frozen=True)
class World:
    """The place of this process among the workers."""

    rank: int
    """The rank of this process among all workers."""
    size: int
    """The number of all workers."""
    local_rank: int
    """The rank of this process among the workers on this machine."""
    local_size: int
    """The number of workers on this machine."""


def world_from_environment() -> World:
    """The world that the environment variables of torchrun describe.

    Raises:
        OptionError: they describe none.
    """
    found = variables()
    present = [name for name in REQUIRED if name in found]
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise OptionError(
            f"{', '.join(f'{name}={found[name]}' for name in present)} without {', '.join(missing)}: start the "
            f"script with torchrun, which sets all of them, or unset {', '.join(present)} and set MOREH_WORKERS to the "
            "number of workers"
        )
    numeric = {name: found[name] for name in REQUIRED[:4]}
    if not all(value.isascii() and value.isdecimal() for value in numeric.values()):
        given = ", ".join(f"{name}={value!r}" for name, value in numeric.items())
        raise OptionError(f"{given}: expected whole numbers; start the script with torchrun, which sets them")
    rank, size, local_rank, local_size = map(int, numeric.values())
    port = found["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise OptionError(f"MASTER_PORT={port!r}: expected the number of a port, 1 to 65535")
    if rank >= size or local_rank >= local_size or local_size > size:
        raise OptionError(
            f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_size}: expected "
            "ranks from 0, below the number of workers, and as many workers on this machine as there are or fewer; "
            "start the script with torchrun, which sets them"
        )
    return World(rank, size, local_rank, local_size)


def rendezvous(world: World, timeout_s: float) -> Any:
    """The store of a world in which all workers have said that they are there.

    Raises:
        OptionError: the address of rank 0 cannot be used.
        WorkerError: a worker has not come in time; all that are missing are named.
    """
    host, port = variables()["MASTER_ADDR"], int(variables()["MASTER_PORT"])
    where = f"MASTER_ADDR={host}, MASTER_PORT={port}"
    store = _connect(world, host, port, where, timeout_s)
    deadline = time.monotonic() + timeout_s
    names = [f"moreh/here/{rank}" for rank in range(world.size)]
    try:
        store.set(names[world.rank], b"1")
        for wait_s in (min(WARNING_AFTER_S, timeout_s / 2), timeout_s):
            try:
                store.wait(names, timedelta(seconds=max(0.1, min(wait_s, deadline - time.monotonic()))))
            except dist.DistStoreError:
                missing = ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name]))
                text = f"rank {missing} of {world.size} workers has not come to {where}"
                if time.monotonic() >= deadline - 0.2:
                    raise WorkerError(f"{text} within {timeout_s:.0f} s: start it, or look at its output") from None
                print(f"warning: {text}; waiting up to {timeout_s:.0f} s", file=sys.stderr, flush=True)
            else:
                return store
    except dist.DistNetworkError as error:
        raise WorkerError(f"rank 0 at {where} has ended: {_first_line(error)}") from None
    raise WorkerError(f"the workers have not all come to {where} within {timeout_s:.0f} s")


def end_after_others(world: World, store: Any) -> None:
    """Wait at the end of rank 0 until the other workers end, which need its store for the files that they write."""
    if isinstance(store, PrefixStore):  # the agent's, which lives on
        return
    names = [f"moreh/ended/{rank}" for rank in range(world.size)]
    has_failed = hasattr(sys, "last_type")  # Python sets it when an error ends the script
    with contextlib.suppress(dist.DistError):
        store.set(names[world.rank], b"1")
        if world.rank == 0 and not has_failed:
            store.wait(names, timedelta(seconds=ENDING_S))


def _connect(world: World, host: str, port: int, where: str, timeout_s: float) -> Any:
    """The store that rank 0, or the agent of torchrun, has at an address."""
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise OptionError(f"{where}: there is no such host ({error.strerror or error})") from None
    has_agent = variables().get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = world.rank == 0 and not has_agent
    try:
        store = TCPStore(
            host,
            port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=not has_agent,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if is_master:
            raise OptionError(
                f"{where}: rank 0 cannot listen there ({_first_line(error)}): choose another port"
            ) from None
        raise WorkerError(
            f"rank 0 has not come to {where} within {timeout_s:.0f} s: start it, or correct the address"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"/worker/attempt_{attempt}", store) if has_agent else store


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
