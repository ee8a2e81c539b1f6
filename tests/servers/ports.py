"""Free ports of the loopback interface.

They lie below the kernel's ephemeral range. Inside of it an outgoing connection of anyone may take the port of a
server that is down, and a client that polls such a port may even connect to itself.

A port belongs to the process that asked until it ends: an abstract Unix socket of that name is bound and kept, which
other test runs on the machine see and the kernel releases. The TCP port itself stays free to be listened on.
"""

from __future__ import annotations

import random
import socket

_PORTS = range(15_000, 32_000)
_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens, reserved for this process."""
    for port in random.sample(_PORTS, 1_000):
        reservation = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            reservation.bind(f"\0spillway-tests-port-{port}")
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        # Never closed by us: a closed or collected socket would give the name away.
        _reserved.append(reservation)
        return port
    raise RuntimeError(f"1,000 ports of {_PORTS} tried on 127.0.0.1, none is free")
