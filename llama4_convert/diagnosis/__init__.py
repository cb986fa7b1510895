"""How a tensor is wrong: hypotheses on its numbers. Pure functions on arrays, and the one that knows names and siblings."""
