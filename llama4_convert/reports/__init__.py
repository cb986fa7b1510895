"""Results for people: the lines that commands print, and the report of `validate` as one HTML page.

Functions of a result alone. It may import the result types of the folders below; the samples and the commands may import it.
Begin with `summaries.py`, then `html/report.py`.
"""
