"""Two checkpoints side by side: `validate` compares a candidate with its reference, `diff` takes neither for right.

`parity/` compares what two models compute, and `diagnosis/` names how a tensor is wrong. It may import `reference` and what lies
below, not `conversion` beside it; publishing, the reports, the samples and the commands may import it. Begin with `validate.py`.
"""
