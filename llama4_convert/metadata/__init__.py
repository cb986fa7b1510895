"""The small files beside the weights: config.json, the tokenizer, the chat template, params.json, the model card.

Nothing here reads or writes a tensor. Folders above may import this one; it may import `checkpoints` and what lies below, not
`planning` beside it. Begin with `config.py`.
"""
