"""How log lines look: information from rank 0 alone, warnings from every rank, with the rank and its host."""

from __future__ import annotations

import logging
import socket
import sys


def configure(rank: int) -> None:
    """Send the `distllm` loggers to stderr, prefixed `[rank r host]`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank {rank} {socket.gethostname()}] %(levelname)s %(message)s"))
    logger = logging.getLogger("distllm")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
