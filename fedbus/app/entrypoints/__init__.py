"""Where processes other than the command line start, and how they report health and end."""
