"""`fedbus model`: the model repository, and which version is the champion.

Commands that only read open the repository, a directory or S3 (see `fedbus.stores.models.open`), without NATS. Commands
that change the champion send a request to the server manager.
"""
