"""The chat in a terminal: conversation, session, commands, screen."""
