"""Which byte of the source goes to which byte of the output, decided before a tensor is read.

A plan is data: files, tensors, and the pieces that each is copied from. Folders above may import this one; it may import
`checkpoints`, the tables and the quantizers, not `metadata` beside it. Begin with `plan.py`, then `planner.py`.
"""
