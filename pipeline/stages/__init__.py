"""The commands, one file each. A stage reads and writes files; none imports another."""
