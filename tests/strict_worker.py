"""Imported by a worker process: from then on it has the devices of `strict_device`, until it ends."""

from tests.strict_device import strict_device

INSIDE = strict_device()
INSIDE.__enter__()
