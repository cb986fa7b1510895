"""The small files beside the weights: config.json, the tokenizer, the chat template, params.json, the model card.

Nothing here reads or writes a tensor. Conversion, validation and the samples import it; it imports `checkpoints`. Begin with
`config.py`.
"""
