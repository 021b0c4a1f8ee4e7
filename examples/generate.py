"""Continue two prompts with the bundled model, over as many tensor-parallel ranks as are asked for.

python examples/generate.py
launch/mpirun.sh -n 2 python examples/generate.py 2
"""

import sys

from distllm import LLM, SamplingParams

prompts = ["Once upon a time there was", "The old king said to his daughter"]
params = SamplingParams(temperature=0.7, max_tokens=60)

with LLM("demo", tensor_parallel_size=int(sys.argv[1]) if len(sys.argv) > 1 else 1) as llm:
    for output in llm.generate(prompts, params):  # an empty list on every rank but 0
        print(f"{output.prompt}{output.outputs[0].text}\n")
