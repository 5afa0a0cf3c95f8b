"""How a message's value is read: one file each."""
