"""Image classification for the experiments of fedbus."""
