"""The commands, one module a family. What takes long to import is imported by the command that needs it."""
