"""Two checkpoints side by side: `validate` holds a candidate against its reference, `diff` takes neither for right.

`parity/` compares what two models compute, and `diagnosis/` names how a tensor is wrong. It imports `reference` and what lies
below; only the samples and the commands import it. Begin with `validate.py`.
"""
