"""How a wrong tensor is wrong: hypotheses on its numbers, from a permuted axis to a scale of the wrong group.

Begin with `diagnose.py`, whose list of hypotheses is tried in order; `moved_values.py` has the table of permutations. Only
`validation` imports this folder.
"""
