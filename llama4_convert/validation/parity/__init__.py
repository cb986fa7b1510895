"""What two models compute, stage by stage: logits, layers, routers, and the metrics and limits that they are held to.

It computes with torch. Begin with `walk.py`, then `metrics.py`.
"""
