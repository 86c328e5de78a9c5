"""The PostgreSQL storage's connections, statements and outcomes."""
