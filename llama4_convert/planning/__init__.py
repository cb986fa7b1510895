"""Which byte of the source goes to which byte of the output, decided before a tensor is read.

A plan is data: files, tensors, and the pieces that each is copied from. Streaming, conversion and fitting import this folder; it
imports `checkpoints`, the tables and the quantizers. Begin with `plan.py`, then `planner.py`.
"""
