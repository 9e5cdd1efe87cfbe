"""The model repository: versions, champion, signatures, cache."""
