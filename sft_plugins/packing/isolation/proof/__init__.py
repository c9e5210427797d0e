"""What the proof asks a model: which documents, at which limits, in which arithmetic, forward and backward."""
