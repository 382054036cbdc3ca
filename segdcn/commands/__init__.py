"""The console scripts, a file each, and what they share: how they begin, compose their config and end."""
