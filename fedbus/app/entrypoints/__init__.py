"""Entry points of processes other than the command line, their health reports and signal handling."""
