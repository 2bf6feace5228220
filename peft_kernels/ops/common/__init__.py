"""What the op families share."""
