"""Many runs that differ in settings and seeds, and the table that they end in."""
