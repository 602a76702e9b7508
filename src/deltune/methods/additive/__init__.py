"""Methods that add modules, keys and values, or input positions."""
