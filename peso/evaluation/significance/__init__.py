"""Which differences between systems are more than chance in users and seeds."""
