"""`distllm bench`: what the engine, its communicators and its kernels take, beside the least they could take.

Collective where the engine is: every rank calls the same measurement, rank 0's figures count.
"""
