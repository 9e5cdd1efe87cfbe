"""The engine ``local``: worker processes on this machine, forked from a process that has imported the app."""
