"""What the demo is made of: orders to produce, a broker, a database, the daemon's process, the check, the screen."""
