"""Run by mpirun: what this rank is, by MPI and by its launcher. With a number: refuse another world size."""

from __future__ import annotations

import sys

from distllm import env
from distllm.comm.connect import open_control
from distllm.parallel.layout import RankLayout

control = open_control()
identity = env.launcher_identity()
assert identity is not None and identity.rank == control.rank and identity.local_rank == control.local_rank
if sys.argv[1:]:
    RankLayout(tp_size=int(sys.argv[1])).check_world_size(control.size)
print(
    f"rank {control.rank} of {control.size}, local {control.local_rank} of {control.local_size}, "
    f"launcher says {identity.rank} of {identity.size}",
    flush=True,
)
control.close()
