"""The SQLite storage's connections, statements and errors."""
