"""The paper: patches, the transformer, the masked autoencoder, UNETR, and weights in and out.

Knows nothing of files of scans, tasks or notebooks.
"""
