"""`fedbus demo`: the whole life of a federated model on one machine."""
