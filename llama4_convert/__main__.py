"""`python -m llama4_convert`, where the script is not on the path."""

from llama4_convert.commands.cli import main

main()
