"""Ray-cast pictures whose depth is known."""
