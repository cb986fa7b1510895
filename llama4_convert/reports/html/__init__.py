"""The report of `validate` as one HTML file without script and network, from its result alone. Begin with `report.py`."""
