"""Does self pre-training help here, by how much, and when not? The study of docs/protocol.md, one command, resumable."""
