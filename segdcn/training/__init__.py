"""Training as Lightning modules, callbacks and losses."""
