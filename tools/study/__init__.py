"""The study on real scans: what is compared, the runs, and the tables and figures made of them
(docs/protocol.md).
"""
