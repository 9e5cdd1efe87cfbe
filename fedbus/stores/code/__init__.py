"""The code repository: Git, checkouts, signers, requirements."""
