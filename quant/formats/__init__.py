"""Formats: under which names and in which bytes a runtime finds what a scheme computed."""
