"""Results for people: the lines that commands print, and the report of `validate` as one HTML page.

Functions of a result alone. It imports nothing that computes; only the commands import it. Begin with `summaries.py`.
"""
