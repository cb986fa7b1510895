"""The command line, a file a kind of command: options in, a function of the package called, its result printed.

No other folder imports this one. Heavy modules are imported inside the commands, so that `--help` is quick. Begin with `cli.py`.
"""
