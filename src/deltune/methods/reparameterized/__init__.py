"""Methods that reparameterise the change of a weight matrix."""
