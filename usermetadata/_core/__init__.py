"""What makes the library work; nothing in here is public."""
