"""What a run leaves behind, and how it is found again: its folder, its environment, its checkpoints."""
