"""The study on real scans: what is compared, the runs, their tables and figures (docs/protocol.md)."""
