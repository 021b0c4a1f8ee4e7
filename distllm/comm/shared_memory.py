"""Unlinks MPI's shared-memory files as soon as all ranks of the host have them mapped.

MPICH removes its file in MPI_Finalize, which a killed or aborted job never reaches; Open MPI leaves it to the
launcher, which a singleton does not have. A file that has no name any more goes with its last process.
"""

from __future__ import annotations

from pathlib import Path

MPICH = "/dev/shm/mpich_shm_"
OPEN_MPI = "/dev/shm/sm_segment."


def unlink_attached(prefix: str) -> None:
    """Called by one rank of each host when all of its ranks have left MPI_Init: none attaches later."""
    for path in attached_files(Path("/proc/self/maps").read_text(), prefix):
        Path(path).unlink(missing_ok=True)


def attached_files(maps: str, prefix: str) -> set[str]:
    """The files with this prefix in the text of a /proc/…/maps that still have a name."""
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines())
    return {path for path in paths if path.startswith(prefix) and not path.endswith("(deleted)")}
