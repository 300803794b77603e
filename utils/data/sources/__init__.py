"""The sources of data: files, tables, the hub, and the sources of installed packages."""
