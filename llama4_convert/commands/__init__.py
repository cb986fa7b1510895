"""The command line, a file a kind of command: options in, a function of the package called, its result printed.

It may import every package, and none may import it. Heavy modules are imported inside the commands, so that `--help` is quick.
Begin with `cli.py`.
"""
