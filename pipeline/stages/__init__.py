"""The verbs of the command line, one file each. A stage reads files and writes files; none imports another."""
