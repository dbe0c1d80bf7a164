"""For this repository, not for users of the package: its environment, demo, figures and study.

The command is `python -m tools COMMAND`.
"""
