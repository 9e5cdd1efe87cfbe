"""Tables, charts, progress bars and live screens in the terminal."""
