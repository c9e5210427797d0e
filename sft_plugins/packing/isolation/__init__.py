"""What documents of a packed row may see: nothing of one another, proved on the model at hand."""
