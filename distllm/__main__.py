"""`python -m distllm`: the same as the console script."""

from distllm.cli.main import main

main()
