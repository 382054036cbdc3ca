"""Pictures, tables for a terminal, and how a failing one is told."""
