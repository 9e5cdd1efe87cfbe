"""One S3 bucket: objects, lock, public access."""
