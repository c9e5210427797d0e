"""A conversation → its turns, planned anew or as others of its shape were planned before."""
