"""What is kept: models, code, captured data. The only package that runs git."""
