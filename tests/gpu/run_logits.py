"""On every rank: the logits of the checkpoint in FOLDER, into files beside it. FOLDER TP PP."""

from __future__ import annotations

import sys
from pathlib import Path

from distllm.comm.connect import open_channels, open_control
from distllm.comm.devices import select_device
from distllm.parallel.layout import RankLayout
from tests.gpu.logit_cases import ALLOWED, SEED, logits_file, texts, write_logits
from tests.unit.models.stepping import run_rank


def main() -> None:
    folder, tp, pp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    control = open_control(world_size_wanted=tp * pp)
    device = select_device(control)
    layout = RankLayout(tp, pp).at(control.rank)
    channels = open_channels(control, layout, device)
    for dtype in ALLOWED:
        logits = run_rank(channels, folder, layout, texts(), SEED, dtype, device)
        if control.rank == control.size - 1:
            write_logits(logits_file(folder, tp, pp, dtype), logits)
    channels.close()
    control.close()


main()
