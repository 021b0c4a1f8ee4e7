"""RankLayout: which rank owns which cell of dp × pp × tp. Pure arithmetic; knows no communicator.

tp varies fastest, so that the ranks that talk most sit side by side on one host. Eight ranks as pp 2 × tp 4:

            tp 0  tp 1  tp 2  tp 3
    pp 0      0     1     2     3      tp group of rank 5: [4, 5, 6, 7]
    pp 1      4     5     6     7      pp group of rank 5: [1, 5]
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.errors import LayoutError


@dataclass(frozen=True)
class RankLayout:
    """One rank's place in the grid. rank = (dp_rank · pp_size + pp_rank) · tp_size + tp_rank."""

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size", "dp_size"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise LayoutError(f"rank {self.rank} is outside the layout {self.equation}")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def equation(self) -> str:
        dp = f" × dp {self.dp_size}" if self.dp_size > 1 else ""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"tp {self.tp_size} × pp {self.pp_size}{dp} = {ranks}"

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size % self.pp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tp_size * self.pp_size)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def tp_group(self) -> list[int]:
        first = self.rank - self.tp_rank
        return list(range(first, first + self.tp_size))

    @property
    def pp_group(self) -> list[int]:
        first = self.dp_rank * self.pp_size * self.tp_size + self.tp_rank
        return [first + stage * self.tp_size for stage in range(self.pp_size)]

    def at(self, rank: int) -> RankLayout:
        """The same grid seen from another rank."""
        return RankLayout(self.tp_size, self.pp_size, self.dp_size, rank)

    def check_world_size(self, world_size: int) -> None:
        """Raise LayoutError unless exactly world_size ranks were started for this layout."""
        if world_size != self.world_size:
            raise LayoutError(
                f"{self.equation}, but {world_size} rank{'s were' if world_size != 1 else ' was'} started; "
                f"start {self.world_size} (mpirun -n {self.world_size} …) or change -tp / -pp"
            )
