"""Task directories: reading, checking and creating them."""
