"""compute-sanitizer over the kernels, at small odd shapes: overruns, races, unwritten memory, wrong barriers.

    python tests/gpu/sanitize.py       the Triton kernels
    python tests/gpu/sanitize.py 2     the peer-memory kernels, on so many GPUs

Prints a line for each tool and what counts against us; ends with 1 if anything does. memcheck counts for the
libraries' kernels too: a wrong index of ours shows there. The other tools know them too little.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OPTIONS = ("--show-backtrace", "no", "--report-api-errors", "no")
OUR_KERNEL = re.compile(r"\w_kernel\b|all_reduce")  # as Triton's are named; as those of one_shot.cu are
NO_FINDING = re.compile(r"COMPUTE-SANITIZER|.*SUMMARY: ")


@dataclass(frozen=True)
class Findings:
    ours: list[str]
    of_libraries: list[str]

    @classmethod
    def parse(cls, output: str) -> Findings:
        """A finding begins with `========= Text` and goes on with `=========     more`."""
        found: list[str] = []
        for line in re.findall(r"^=========(.*)", output, re.MULTILINE):
            if not line.startswith("  "):
                found.append(line.strip())
            elif found:
                found[-1] += "\n" + line
        found = [text for text in found if text and not NO_FINDING.match(text)]
        ours = [text for text in found if OUR_KERNEL.search(text)]
        return cls(ours, [text for text in found if text not in ours])


def sanitize(tool: str, num_ranks: int, what: str) -> Findings:
    start = [str(ROOT / "launch/mpirun.sh"), "-n", str(num_ranks)] if num_ranks > 1 else []
    command = [*start, "compute-sanitizer", "--tool", tool, *OPTIONS]
    # Torch's cache would lay tensors side by side in one allocation, where an overrun meets a neighbour.
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, sys.executable, "tests/gpu/run_sanitized.py", what],
        cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    if "SUMMARY: " not in done.stdout or (done.returncode and what != "plant"):
        sys.exit(f"{tool} did not come to an end, code {done.returncode}:\n{done.stdout}")
    return Findings.parse(done.stdout)


def counted(tool: str, findings: Findings) -> list[str]:
    return findings.ours + (findings.of_libraries if tool == "memcheck" else [])


def main() -> None:
    num_ranks = int(sys.argv[1]) if sys.argv[1:] else 1
    if not sanitize("memcheck", 1, "plant").ours:
        sys.exit("memcheck does not see one value read past the end of a tensor: nothing here can be trusted")
    what, against_us = "peer memory" if num_ranks > 1 else "Triton", 0
    for tool in TOOLS[: 3 if num_ranks > 1 else 4]:  # initcheck does not see what a peer writes
        started = time.perf_counter()
        # Libraries write 16-bit products by bulk copies, which initcheck does not see.
        findings = sanitize(tool, num_ranks, "Triton in fp32" if tool == "initcheck" else what)
        seconds = time.perf_counter() - started
        numbers = f"{len(findings.ours)} in our kernels, {len(findings.of_libraries)} in libraries"
        print(f"{tool:9} {what}: {numbers}, {seconds:.0f} s", *counted(tool, findings), sep="\n", flush=True)
        against_us += len(counted(tool, findings))
    sys.exit(against_us > 0)


if __name__ == "__main__":
    main()
