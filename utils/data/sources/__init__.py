"""Data sources: files, tables, the Hub, and source code of installed packages."""
