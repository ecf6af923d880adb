"""What models and machines can do, in numbers."""
