"""Unlinks the shared-memory file of MPICH as soon as all ranks of the host have it mapped.

MPICH removes /dev/shm/mpich_shm_* in MPI_Finalize, which a killed or aborted job never reaches. A file that
has no name any more goes with its last process. (Open MPI needs none of this: its launcher cleans up.)
"""

from __future__ import annotations

from pathlib import Path

PREFIX = "/dev/shm/mpich_shm_"


def unlink_attached() -> None:
    """Called by one rank of each host when all of its ranks have left MPI_Init: none attaches later."""
    for path in attached_files(Path("/proc/self/maps").read_text()):
        Path(path).unlink(missing_ok=True)


def attached_files(maps: str) -> set[str]:
    """The MPICH segments in the text of a /proc/…/maps that still have a name."""
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines())
    return {path for path in paths if path.startswith(PREFIX) and not path.endswith("(deleted)")}
