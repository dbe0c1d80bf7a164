"""For this repository, not for users of the package: its environment, demo, figures and study. `python -m
tools COMMAND`.
"""
