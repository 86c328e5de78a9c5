"""The implementation; nothing in this package is public."""
