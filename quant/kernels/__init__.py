"""Compiled inner loops of the schemes."""
