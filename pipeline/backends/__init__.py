"""The heavy libraries, one file each; nothing else imports them."""
