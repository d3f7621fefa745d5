"""What servers differ in: their addresses, and the parameters that they refuse."""
