"""What the console scripts share: how they begin, compose their config and end."""
