"""Checkpoints to try things on: random ones of any size, and a small Llama 4 that was really trained.

It may import every package but the commands, which alone may import it. Begin with `demo.py` and `synthetic/synth.py`;
`train_demo.py` made the small model, from the texts of `corpus.py` and the drawings of `pictures.py`.
"""
