"""The commands, a file a kind. Heavy modules are imported inside of them, so that `--help` is quick."""
