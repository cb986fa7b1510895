"""How a tensor is wrong: hypotheses on its numbers, from a permuted axis to a scale of the wrong group.

Pure functions on arrays, and one module that knows names and siblings. Begin with `diagnoser.py`.
"""
