"""Look whether a Ray cluster answers, before work starts: Ray itself would try for minutes, and log its attempts."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from deepseek_compress.errors import DscError

SECONDS = 5.0
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, 3.4: with empty settings
SETTINGS = 4  # type of the frame that a server of HTTP/2, and so of gRPC, answers with
FIX = "give the address of a running cluster (`ray status`), or auto"


def cluster_problems(address: str | None) -> list[DscError]:
    """Return what keeps a run from the cluster at `address`; nothing without one."""
    try:
        reach(address)
    except DscError as error:
        return [error]
    return []


def reach(address: str | None) -> None:
    """Raise `DscError` where no gRPC server, which every Ray cluster has, answers at HOST:PORT."""
    if address is None:
        return
    place = address
    if address == "auto":  # what the last `ray start` on this machine left, which may be gone
        left = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
        place = os.environ.get("RAY_ADDRESS") or (left.read_text().strip() if left.is_file() else "")
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
                connection.sendall(HELLO)
                answer = connection.recv(9, socket.MSG_WAITALL)
                if len(answer) < 9 or answer[3] != SETTINGS:
                    raise DscError(f"--ray {address}: what listens at {host}:{port} is not a Ray cluster", FIX)
    except ConnectionRefusedError:
        raise DscError(f"--ray {address}: nobody listens at {host}:{port}", FIX) from None
    except socket.gaierror:
        raise DscError(f"--ray {address}: unknown host {host}", FIX) from None
    except (OSError, OverflowError) as error:
        raise DscError(f"--ray {address}: no answer from {host}:{port} ({error})", FIX) from None
